"`check_data`: every fault planted is found, and a clean folder is called clean."
import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mstoolkit.data.check import check_data, findings_html, findings_text
from mstoolkit.data.make import make_digits
from mstoolkit.data.sources import image_files

from corpus import bad_files, write_corpus


def scene(seed, size=96):
    "A picture like no other."
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def clean(tmp_path):
    n = 0
    for split, k in dict(train=6, val=3).items():
        for c in ('ant', 'bee', 'cat'):
            (tmp_path/'d'/split/c).mkdir(parents=True)
            for i in range(k):
                Image.fromarray(scene(n)).save(tmp_path/'d'/split/c/f'{i}.png')
                n += 1
    return tmp_path/'d'


def kinds(report, level=None): return {f.kind for f in report.findings if level in (None, f.level)}


def finding(report, kind): return next(f for f in report.findings if f.kind == kind)


def test_a_clean_folder(clean):
    r = check_data(clean)
    assert r.ok and not r.findings and r.counts == dict(train=dict(ant=6, bee=6, cat=6), valid=dict(ant=3, bee=3, cat=3), test={})
    assert 'nothing here would hurt training' in str(r) and 'Nothing to mend' in findings_html(r)


def test_every_bad_file_is_listed(clean):
    write_corpus(clean/'train'/'ant')
    r = check_data(clean)
    listed = {g[0] for f in r.findings if f.kind.startswith('unreadable') for g in f.files}
    assert listed == {str(clean/'train'/'ant'/n) for n in bad_files()} and not r.ok


def test_special_files(clean):
    import os
    os.mkfifo(clean/'train'/'ant'/'pipe.jpg')
    (clean/'train'/'ant'/'link.jpg').symlink_to('nowhere')
    r = check_data(clean)
    assert {g[0].rpartition('/')[2] for g in finding(r, 'unreadable: missing').files} == {'pipe.jpg', 'link.jpg'}


def test_leaks_and_conflicts(clean):
    shutil.copy(clean/'train/ant/0.png', clean/'val/ant/leak.png')
    shutil.copy(clean/'train/ant/1.png', clean/'train/bee/clash.png')
    shutil.copy(clean/'train/cat/2.png', clean/'train/cat/twice.png')
    r = check_data(clean)
    assert [sorted(p.rpartition('/')[2] for p in g) for g in finding(r, 'leak (exact)').files] == [['0.png', 'leak.png']]
    assert [sorted(p.rpartition('/')[2] for p in g) for g in finding(r, 'label conflict (exact)').files] == [['1.png', 'clash.png']]
    assert finding(r, 'duplicates (exact)').level == 'note'
    assert kinds(r, 'error') == {'leak (exact)', 'label conflict (exact)'}


@pytest.mark.parametrize('change', ['smaller', 'jpeg', 'brighter'])
def test_near_duplicates(clean, change):
    im = Image.open(clean/'train/bee/3.png')
    if change == 'smaller': im.resize((64, 64), Image.Resampling.LANCZOS).save(clean/'val/bee/near.png')
    if change == 'jpeg': im.save(clean/'val/bee/near.jpg', quality=60)
    if change == 'brighter': Image.fromarray(np.clip(np.asarray(im).astype(int)+2, 0, 255).astype(np.uint8)).save(clean/'val/bee/near.png')
    r = check_data(clean)
    assert kinds(r) == {'leak (near)'} and r.ok  # a warning: the eye must decide
    assert len(finding(r, 'leak (near)').files) == 1


def test_near_duplicates_among_many():
    from mstoolkit.data.check import _look, _near_pairs
    ims = [scene(i, 48) for i in range(1500)]
    looks = [_look(im) for im in ims+[cv2.resize(ims[7], (40, 40), interpolation=cv2.INTER_AREA)]]
    assert _near_pairs(looks) == [(7, 1500)]


def test_flat_pictures_are_no_twins(clean):
    for i in range(9): Image.new('RGB', (50, 50), (i*20,)*3).save(clean/'train'/'ant'/f'flat{i}.png')
    assert check_data(clean).findings == []


def test_classes(clean):
    (clean/'train'/'dog').mkdir()
    (clean/'val'/'fox').mkdir()
    Image.fromarray(scene(500)).save(clean/'val'/'fox'/'1.png')
    shutil.rmtree(clean/'val'/'ant')
    r = check_data(clean)
    assert kinds(r, 'error') == {'empty class', 'unknown class'} and kinds(r, 'warning') == {'missing class'}
    assert "'dog'" in finding(r, 'empty class').text and "'fox'" in finding(r, 'unknown class').text and "'ant'" in finding(r, 'missing class').text


def test_one_class_no_images_imbalance(tmp_path):
    (tmp_path/'a').mkdir()
    assert 'no images' in kinds(check_data(tmp_path))
    for i in range(12): Image.fromarray(scene(i)).save(tmp_path/'a'/f'{i}.png')
    assert 'one class' in kinds(check_data(tmp_path))
    (tmp_path/'b').mkdir()
    Image.fromarray(scene(99)).save(tmp_path/'b'/'1.png')
    assert kinds(check_data(tmp_path)) == {'imbalance', 'missing class'}  # of one image: validation will not see it


def test_endings_and_shapes(clean):
    Image.fromarray(scene(700)).save(clean/'train'/'ant'/'x.jpg', 'PNG')
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (10, 200, 3), np.uint8)).save(clean/'train'/'ant'/'long.png')
    r = check_data(clean)
    assert kinds(r) == {'wrong ending', 'odd shape'} and finding(r, 'wrong ending').files[0][1] == 'is PNG'


def test_fast_reads_headers_only(clean, monkeypatch):
    (clean/'train'/'ant'/'zero.png').touch()
    monkeypatch.setattr('mstoolkit.data.check.decode_image', lambda *_: pytest.fail('decoded'))
    r = check_data(clean, fast=True)
    assert kinds(r) == {'unreadable: empty'} and r.sizes['median'] == '96 × 96'


def test_table(clean):
    files = image_files(clean/'train')
    df = pd.DataFrame({'path': files, 'label': [f.parent.name for f in files], 'split': ['train', 'valid']*9})
    assert check_data(clean, csv=df).counts['valid'] == dict(ant=3, bee=3, cat=3)


def test_json_and_html(clean):
    shutil.copy(clean/'train/ant/0.png', clean/'val/ant/<script>.png')
    r = check_data(clean)
    d = json.loads(r.json())
    assert d['ok'] is False and d['findings'][0]['kind'] == 'leak (exact)'
    page = findings_html(r)
    assert page.startswith('<!doctype html>') and '<script>' not in page and page.count('data:image/jpeg') == 2
    assert 'http' not in page  # nothing is fetched
    assert '<html' not in r._repr_html_()


def test_text_of_many_classes_and_odd_names(tmp_path):
    for c in range(50):
        (tmp_path/f'c{c}').mkdir()
        Image.fromarray(scene(c)).save(tmp_path/f'c{c}'/'1.png')
    (tmp_path/'c1'/'new\nline.png').touch()
    text = findings_text(check_data(tmp_path))
    assert '… and 10 more classes' in text and 'new\\nline.png' in text


def test_digits_are_clean(tmp_path):
    r = check_data(make_digits(tmp_path/'digits'))
    assert r.ok, [f.text for f in r.findings]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder'): check_data(tmp_path/'x')


def test_a_table_is_checked_to_its_end(clean):
    "What would stop training at the first row is listed whole."
    rows = [(f'train/{c}/{i}.png', c, 'train') for c in ('ant', 'bee') for i in range(6)]
    rows += [('gone/1.png', 'ant', 'train'), ('gone/2.png', 'bee', 'train'), ('train/ant/0.png', 'ant', 'valid'), ('train/bee/1.png', 'ant', 'train')]
    r = check_data(clean, csv=pd.DataFrame(rows, columns=['path', 'label', 'split']))
    assert not r.ok and kinds(r, 'error') == {'unreadable: missing', 'leak (exact)', 'label conflict (exact)'}
    assert finding(r, 'leak (exact)').files == [[str(clean/'train/ant/0.png'), "listed as train 'ant' and valid 'ant'"]]
    assert finding(r, 'label conflict (exact)').files == [[str(clean/'train/bee/1.png'), "listed as train 'bee' and train 'ant'"]]
    assert [f for f, why in finding(r, 'unreadable: missing').files] == [str(clean/'gone'/'1.png'), str(clean/'gone'/'2.png')]


def test_images_without_folders(clean):
    r = check_data(clean/'train'/'ant')
    assert not r.ok and finding(r, 'no classes').text.startswith('6 images and no class: put each class in a folder of its own')


def test_a_class_list_that_is_not_there_is_named(clean):
    "Its name is not taken for a list of letters."
    with pytest.raises(FileNotFoundError, match="there is no class list 'nmaes.txt'"): check_data(clean, classes='nmaes.txt', fast=True)
