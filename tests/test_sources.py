"Folders, tables and lists as samples; splits that are stratified, disjoint and keep groups together."
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from mstoolkit.data.sources import (DataSource, Sample, class_names, fold_split, folder_samples, list_samples, read_classes,
                                    source_samples, split_folders, stratified_split, table_samples)


def touch(root, *files):
    for f in files:
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        (root/f).touch()


def labels(samples): return [s.label for s in samples]


samples_st = st.lists(st.tuples(st.sampled_from('abcdef'), st.integers(0, 6)), min_size=2, max_size=120).map(
    lambda o: [Sample(Path(f'{i}.png'), c, f'g{g}' if g else '') for i, (c, g) in enumerate(o)])
plain_st = st.lists(st.sampled_from('abcdef'), min_size=2, max_size=150).map(lambda o: [Sample(Path(f'{i}.png'), c) for i, c in enumerate(o)])


@settings(max_examples=150, deadline=None)
@given(plain_st, st.floats(.01, .99), st.integers(0, 2**32-1))
def test_stratified_split(samples, pct, seed):
    train, valid = stratified_split(samples, pct, seed)
    assert sorted(train+valid, key=str) == sorted(samples, key=str)
    n, t = Counter(labels(samples)), Counter(labels(train))
    for c in n:
        assert t[c] >= 1  # nothing to validate that could not be learned
        assert abs((n[c]-t[c])-pct*n[c]) <= 1 or t[c] == 1 or n[c]-t[c] == 1
        assert n[c] == 1 or t[c] < n[c]
    assert stratified_split(samples, pct, seed) == (train, valid)


@settings(max_examples=150, deadline=None)
@given(plain_st, st.integers(2, 6), st.integers(0, 2**32-1))
def test_folds(samples, folds, seed):
    folds = min(folds, len(samples))
    held = [fold_split(samples, folds, k, seed) for k in range(folds)]
    assert sorted((s for _, v in held for s in v), key=str) == sorted(samples, key=str)
    assert all(sorted(t+v, key=str) == sorted(samples, key=str) for t, v in held)
    assert max(len(v) for _, v in held)-min(len(v) for _, v in held) <= 1
    for c, n in Counter(labels(samples)).items(): assert {labels(v).count(c) for _, v in held} <= {n//folds, n//folds+1}


def test_what_sklearns_stratified_splits_cannot_do():
    "Why the plain splits are our own: a class of one image, a rare class, more folds than images of any class."
    from sklearn.model_selection import StratifiedKFold, train_test_split
    few = [Sample(Path(f'{c}{i}'), c) for c, n in dict(a=30, b=2, c=1).items() for i in range(n)]
    with pytest.raises(ValueError, match='least populated class'): train_test_split(few, test_size=.2, stratify=labels(few), random_state=0)
    _, held = train_test_split(few[:32], test_size=.2, stratify=labels(few[:32]), random_state=0)
    assert 'b' not in labels(held) and 'b' in labels(stratified_split(few, .2, 0)[1])
    pairs = few[:2] + few[30:32]
    with pytest.raises(ValueError, match='cannot be greater'): next(StratifiedKFold(3).split(pairs, labels(pairs)))
    assert sorted(s.path.name for k in range(3) for s in fold_split(pairs, 3, k, 0)[1]) == ['a0', 'a1', 'b0', 'b1']


@settings(max_examples=100, deadline=None)
@given(samples_st, st.integers(2, 4), st.integers(0, 2**32-1))
def test_groups_stay_together(samples, folds, seed):
    n_groups = len({s.group or s.path for s in samples})
    if n_groups < folds or not any(s.group for s in samples): return
    seen = []
    for k in range(folds):
        train, valid = fold_split(samples, folds, k, seed)
        assert not {s.group for s in train if s.group} & {s.group for s in valid if s.group}
        seen += valid
    assert sorted(seen, key=str) == sorted(samples, key=str)


def test_grouped_folds_are_about_as_even_as_sklearns():
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold
    rng = np.random.default_rng(0)
    samples = [Sample(Path(f'{i}'), str(rng.integers(4)), f'g{rng.integers(60)}') for i in range(900)]
    def unevenness(parts): return np.mean([abs(Counter(p)[c]/len(p)-labels(samples).count(c)/900) for p in parts for c in '0123'])
    ours = unevenness([labels(fold_split(samples, 5, k, 0)[1]) for k in range(5)])
    sk = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(samples, labels(samples), [s.group for s in samples])
    theirs = unevenness([[samples[i].label for i in v] for _, v in sk])
    assert ours < 1.5*theirs+.005, (ours, theirs)


def test_split_values():
    one = [Sample(Path('a'), 'x'), Sample(Path('b'), 'y')]
    for pct in (0, 1, -.1, 1.5):
        with pytest.raises(ValueError, match='valid_pct .* must lie between 0 and 1'): stratified_split(one, pct, 0)
    with pytest.raises(ValueError, match='3 folds of 2 images'): fold_split(one, 3, 0, 0)
    with pytest.raises(ValueError, match='fold 2 of 2'): fold_split(one, 2, 2, 0)


@pytest.mark.parametrize('name', ['val', 'valid', 'validation'])
def test_validation_folder_by_any_name(tmp_path, name):
    touch(tmp_path, 'train/2/a.jpg', 'train/10/a.jpg', f'{name}/2/b.jpg', 'test/c.jpg')
    train, valid = split_folders(tmp_path)
    assert (labels(train), labels(valid)) == (['2', '10'], ['2'])


def test_own_folder_names(tmp_path):
    touch(tmp_path, 'training/a/1.jpg', 'training/b/1.jpg', 'test/a/2.jpg')
    train, valid = split_folders(tmp_path, 'training', 'test')
    assert (labels(train), labels(valid)) == (['a', 'b'], ['a'])
    with pytest.raises(FileNotFoundError, match="no validation folder or list '.*held'"): split_folders(tmp_path, 'training', 'held')
    with pytest.raises(FileNotFoundError, match="no training folder or list '.*tra'"): split_folders(tmp_path, 'tra')


def test_no_train_folder_means_the_folder_itself(tmp_path):
    touch(tmp_path, 'a/1.jpg', 'b/1.jpg', 'test/2.jpg')
    assert [labels(o) for o in split_folders(tmp_path)] == [['a', 'b'], []]
    touch(tmp_path, 'val/a/1.jpg')
    with pytest.raises(FileNotFoundError, match='no training folder'): split_folders(tmp_path)


def test_nested_folders_count_for_their_class(tmp_path):
    touch(tmp_path, 'a/x/1.jpg', 'a/x/y/2.jpg', 'a/3.jpg', 'b/.cache/4.jpg', 'b/5.jpg')
    assert Counter(labels(folder_samples(tmp_path))) == dict(a=3, b=1)


def test_empty_folders(tmp_path):
    touch(tmp_path, 'train/a/1.jpg', 'train/b/notes.txt', 'val/a/2.jpg')
    (tmp_path/'train/c').mkdir()
    with pytest.raises(ValueError, match="class folders without images in '.*train': 'b', 'c'; fill or remove"): split_folders(tmp_path)
    touch(tmp_path, 'train/b/1.jpg', 'train/c/1.jpg')
    (tmp_path/'val/b').mkdir()
    assert labels(split_folders(tmp_path)[1]) == ['a']  # missing or empty in validation is fine


def test_images_beside_class_folders_are_an_error(tmp_path):
    touch(tmp_path, '1.jpg', '2.jpg')
    with pytest.raises(ValueError, match='has images and no class folders'): split_folders(tmp_path)
    (tmp_path/'e').mkdir()
    with pytest.raises(ValueError, match='there are no images in'): split_folders(tmp_path/'e')


def test_class_only_in_validation(tmp_path):
    touch(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg', 'val/a/1.jpg', 'val/c/1.jpg')
    with pytest.raises(ValueError, match="could not learn it: class 'c' of"): split_folders(tmp_path)
    one = [Sample(Path('x'), 'a'), Sample(Path('y'), 'b')]
    with pytest.raises(ValueError, match=r"class 'c' is in the validation set \(z\)"): class_names(one, [Sample(Path('z'), 'c')])


def test_class_order():
    s = [Sample(Path(str(i)), str(i)) for i in (10, 9, 100)]
    assert class_names(s, [])[0] == ['9', '10', '100']
    assert class_names(s, [], ['100', '9', '10'])[0] == ['100', '9', '10']
    with pytest.raises(ValueError, match="not in the class list: '100'"): class_names(s, [], ['9', '10'])
    with pytest.raises(ValueError, match="only one class, '9'"): class_names(s[1:2], [])


def test_tables(tmp_path):
    touch(tmp_path, 'i/a.jpg', 'i/b.jpg', 'i/c.jpg')
    df = pd.DataFrame({'path': ['i/a.jpg', 'i/b.jpg', tmp_path/'i/c.jpg'], 'label': [1, 2, 1], 'who': list('xyz'),
                       'split': ['train', 'train', 'valid']})
    df.to_csv(tmp_path/'t.csv', index=False)
    df.to_csv(tmp_path/'t.tsv', index=False, sep='\t')
    df.to_csv(tmp_path/'semicolons.csv', index=False, sep=';')
    for t in (df, tmp_path/'t.csv', tmp_path/'t.tsv', str(tmp_path/'t.csv'), tmp_path/'semicolons.csv'):
        train, valid = table_samples(t, tmp_path, group='who')
        assert (labels(train), labels(valid), [s.group for s in train]) == (['1', '2'], ['1'], ['x', 'y'])
    for broken, why in [(df.drop(columns='path'), "no column 'path'; it has"),
                        (df.assign(split='trian'), "unknown split 'trian'; did you mean 'train'"),
                        (df.assign(label=[1, None, 2]), '1 row of the table with no label: row 2, counted'),
                        (df.assign(path='i/a.jpg'), "two labels, '1' and '2'"), (df.assign(split='test'), 'no training rows')]:
        with pytest.raises(ValueError, match=why): source_samples(DataSource(tmp_path, csv=broken))
    for n, text in ((3, '3 files'), (1, '1 file')):
        gone = df.assign(path=['i/x.jpg']*n + df.path.tolist()[n:], label=1)
        with pytest.raises(FileNotFoundError, match=f'{text} of the table not there, the first: .*x.jpg.; `mstoolkit check` lists all'):
            source_samples(DataSource(tmp_path, csv=gone))
        assert len(sum(source_samples(DataSource(tmp_path, csv=gone), strict=False), [])) == 3
    with pytest.raises(FileNotFoundError, match='there is no table'): table_samples(tmp_path/'x.csv', tmp_path)
    (tmp_path/'bin.csv').write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match='bin.csv. is not UTF-8: save it as such'): table_samples(tmp_path/'bin.csv', tmp_path)
    (tmp_path/'odd.csv').write_text('path,label\n"a,b\n')
    with pytest.raises(ValueError, match='cannot be read as a table'): table_samples(tmp_path/'odd.csv', tmp_path)


def test_parquet(tmp_path):
    pytest.importorskip('pyarrow')
    touch(tmp_path, 'a.jpg', 'b.jpg')
    pd.DataFrame({'path': ['a.jpg', 'b.jpg'], 'label': ['x', 'y']}).to_parquet(tmp_path/'t.parquet')
    assert labels(table_samples(tmp_path/'t.parquet', tmp_path)[0]) == ['x', 'y']


def test_lists(tmp_path):
    touch(tmp_path, 'a b.jpg', 'c.jpg', 'd,e.jpg')
    (tmp_path/'l.txt').write_text('\ufeff# path label\na b.jpg 3\n\nc.jpg 4\n', encoding='utf-8')
    assert [(s.path.name, s.label) for s in list_samples(tmp_path/'l.txt', tmp_path)] == [('a b.jpg', '3'), ('c.jpg', '4')]
    (tmp_path/'m.txt').write_text('"d,e.jpg", x y\nc.jpg,\tz , 7\n')
    assert [(s.path.name, s.label) for s in list_samples(tmp_path/'m.txt', tmp_path)] == [('d,e.jpg', 'x y'), ('c.jpg', 'z')]
    (tmp_path/'n.txt').write_text('c.jpg 1\nlonely\n')
    with pytest.raises(ValueError, match='n.txt, line 2: expected a path and a label'): list_samples(tmp_path/'n.txt', tmp_path)


def test_class_lists(tmp_path):
    (tmp_path/'c.txt').write_text('zebra\nant\n\n')
    assert read_classes(tmp_path/'c.txt') == ['zebra', 'ant']
    (tmp_path/'c.csv').write_text('Name,ID,coarse\nb,1,0\na,10,0\nc,2,0\n')
    assert read_classes(tmp_path/'c.csv') == ['b', 'c', 'a']
    (tmp_path/'d.txt').write_text('a\na\n')
    with pytest.raises(ValueError, match="names class 'a' twice"): read_classes(tmp_path/'d.txt')
    numbered = [Sample(Path('x'), '1'), Sample(Path('y'), '0')]
    names, train, valid = class_names(numbered, numbered[:1], tmp_path/'c.txt')
    assert (names, labels(train), labels(valid)) == (['zebra', 'ant'], ['ant', 'zebra'], ['ant'])
    assert class_names(numbered, [], ['1', '0'])[0] == ['1', '0']  # here the numbers are the names


def test_a_split_that_tears_groups_and_one_that_is_not_wanted(tmp_path):
    touch(tmp_path, *(f'{i}.jpg' for i in range(8)))
    table = pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(8)], label=list('abababab'), who=list('pqrspqtu'), split=['train']*4 + ['val']*4))
    with pytest.raises(ValueError, match="2 groups in training and in validation, the first 'p'"): source_samples(DataSource(tmp_path, csv=table, group='who'))
    assert [len(o) for o in source_samples(DataSource(tmp_path, csv=table))] == [4, 4]
    assert [len(o) for o in source_samples(DataSource(tmp_path, csv=table, group='who', valid='none'))] == [4, 0]
