"""Try hundreds of odd files, folders, tables, models, run folders and command lines, each with what should become of it.

    python benchmarks/corpus.py                    all of them, about ten minutes on two cores; writes corpus.md
    python benchmarks/corpus.py --only 'numbers'   those whose group or name this pattern fits; prints what was said

The cases are in `cases.py`. Each runs in a forked child with a limit of time and memory. Verdicts: ok; crash (a traceback, a signal, no
end); silently wrong (no error or warning where one is due, or other labels or pixels than stated); refused (an error where none is
due); unhelpful (the right exit code, and a message that lacks the bad value, the file or the fix).
"""
import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import cases as here  # noqa: E402
from cases import Case, judge  # noqa: E402
from forked import Child, Outcome, end, members  # noqa: E402

MEMORY = 6*2**30 # bytes that a case may map


def attempt(c: Case, root: Path, n: int) -> tuple[Case, str, str, Outcome|None]:
    "Set a case up, run it in a child, and judge."
    d = root/f'case-{n}'/'work'
    d.mkdir(parents=True)
    try:
        try: made = c.do(d)
        except Exception as e: return c, 'no case', f'{type(e).__name__}: {e}', None
        def run():
            from mstoolkit.cli import main
            known = {here.READY_: here.READY/'data', here.READY_S: here.READY/'heads.toml'}
            return made() if callable(made) else main([str(known.get(a, a)) for a in made])
        child = Child(run, d, d.parent, memory=MEMORY)
        o = child.wait(c.limit)
        end(members(child.pid))
        return c, *judge(c, d, o), o
    finally:
        for p in d.rglob('*'):
            if p.is_dir() and not p.is_symlink(): p.chmod(0o755)
        shutil.rmtree(d.parent, ignore_errors=True)


def prepared(root: Path):
    "Import everything once, and make what the cases start from."
    import mstoolkit.ablation
    import mstoolkit.cli
    import mstoolkit.data.check
    import mstoolkit.predict
    import mstoolkit.report
    import mstoolkit.train  # noqa: F401
    import torch
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    here.READY = root/'ready'
    here.READY.mkdir()
    o = Child(lambda: here.prepare(here.READY) or 0, here.READY, root).wait(300)
    if o.code: raise SystemExit(f'nothing to begin with: {o.text}')


def md(text: str) -> str: return ' '.join(text.replace('|', '\\|').split())[:240]


def page(results: list, args) -> str:
    groups = list(dict.fromkeys(c.group for c, *_ in results))
    verdicts = 'ok', 'crash', 'silently wrong', 'refused', 'unhelpful'
    n = Counter((c.group, v) for c, v, *_ in results)
    total = Counter(v for _, v, *_ in results)
    lines = ['# Odd data, misuse and faults', '', '    python benchmarks/corpus.py', '',
             f'{args.date}, {args.machine}. {len(results)} cases, {total["ok"]} of them as they should be. Each states what should become of it in '
             '`benchmarks/cases.py`: an exit code, words that have to be said, or the classes, labels and pixels that have to come out. '
             'The image files are made by `tests/corpus.py` and by `cases.py`.', '',
             '| group | cases | '+' | '.join(verdicts)+' |', '|---|'+'---|'*(len(verdicts)+1)]
    lines += [f'| {g} | {sum(n[g, v] for v in (*verdicts, "no case"))} | '+' | '.join(str(n[g, v]) for v in verdicts)+' |' for g in groups]
    lines += [f'| all | {len(results)} | '+' | '.join(str(total[v]) for v in verdicts)+' |', '']
    for g in groups:
        lines += [f'## {g.capitalize()}', '', '| case | expected | outcome |', '|---|---|---|']
        for c, v, why, _ in results:
            if c.group != g: continue
            code = ' or '.join(map(str, c.code)) if isinstance(c.code, tuple) else c.code
            said = f', says `{md(c.says)}`' if c.says else ''
            lines.append(f'| {md(c.name)} | {code}{said}{", as stated" if c.see else ""} | {v}{": "+md(why) if why else ""} |')
        lines.append('')
    return '\n'.join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='a pattern')
    p.add_argument('--jobs', type=int, default=os.cpu_count(), help='cases side by side')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--machine', default=f'{os.cpu_count()} processors')
    args = p.parse_args()
    chosen = [c for c in here.cases if re.search(args.only, f'{c.group}: {c.name}')]
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        prepared(Path(tmp))
        with ThreadPoolExecutor(args.jobs) as ex:
            for c, verdict, why, o in ex.map(lambda i: attempt(chosen[i], Path(tmp), i), range(len(chosen))):
                results.append((c, verdict, why, o))
                if verdict != 'ok': print(f'{verdict}: {c.group}, {c.name}: {why}', flush=True)
                if args.only and o: print(f'--- {c.group}, {c.name}: {o.code}, {o.seconds:.1f} s\n{o.text.strip()}', flush=True)
    bad = [o for o in results if o[1] != 'ok']
    print(f'{len(results)} cases, {len(bad)} not as they should be')
    if not args.only:
        from mstoolkit.core import write_text
        write_text(HERE/'corpus.md', page(results, args))
    sys.exit(bool(bad))


if __name__ == '__main__': main()
