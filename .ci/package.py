"""Build the sdist and the wheel of this tree into a directory, and check what is in them.

    python .ci/package.py DIRECTORY [--tag v1.2.3]      (needs build and twine, of the extra "dev")

The wheel is built from the sdist. It has to be the wheel that the tree gives: then the sdist lacks
nothing. With a tag, version and changelog have to be of that release. What this leaves in the
directory is published by .github/workflows/release.yml.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST, LARGEST_SDIST = 295_000, 4_000_000  # bytes of the wheel, and of the sdist
BESIDES = {
    ".ci/run",
    ".github/workflows/test.yml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "benchmarks/counts.json",
    "docs/conf.py",
    "pyproject.toml",
    "tests/oracles.py",
}
RELATIVE = re.compile(r"\]\((?!https?://)[^)]*\)")


def run(*command: object) -> None:
    """Run a module of Python, and stop if it fails."""
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, cwd=ROOT)


def the_only(directory: Path, pattern: str) -> Path:
    """Return the one file of this kind."""
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one {pattern} in {directory}; got {[p.name for p in found]}")
    return found[0]


def contents(wheel: Path) -> dict[str, bytes]:
    """Return what is in the wheel, by name."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def check_wheel(wheel: Path, version: str) -> None:
    """Size, names and description."""
    files = contents(wheel)
    size = wheel.stat().st_size
    assert size < LARGEST, f"the wheel has {size} bytes; expected fewer than {LARGEST}"
    expected = f"hosm_losses-{version}.dist-info/"
    outside = [name for name in files if not name.startswith(("hosm_losses/", expected))]
    assert not outside, f"expected the package alone; got {outside}"
    package = {path.relative_to(ROOT / "src").as_posix() for path in sources()}
    missing = package - set(files)
    assert not missing, f"the wheel lacks {missing}"
    metadata = files[f"{expected}METADATA"].decode()
    relative = RELATIVE.findall(metadata)
    assert not relative, f"PyPI cannot follow {relative}; see fancy-pypi-readme in pyproject.toml"
    print(f"{wheel.name}: {size} bytes, {len(files)} files")


def sources() -> list[Path]:
    """Return the files of the package."""
    package = ROOT / "src" / "hosm_losses"
    return [*package.rglob("*.py"), package / "py.typed"]


def check_sdist(sdist: Path) -> None:
    """Whatever the tests, the documentation and a packager need."""
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= BESIDES, f"the sdist lacks {BESIDES - names}"
    size = sdist.stat().st_size
    assert size < LARGEST_SDIST, f"the sdist has {size} bytes; expected fewer than {LARGEST_SDIST}"
    print(f"{sdist.name}: {size} bytes, {len(names)} files")


def check_tag(tag: str, version: str) -> None:
    """The tag is that of the version, which the changelog knows."""
    assert tag == f"v{version}", f"the tag is {tag}; expected v{version}"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version}]" in changelog, f"CHANGELOG.md has no section ## [{version}]"


def main() -> None:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tag", help="of the release, as in v1.2.3")
    options = parser.parse_args()
    directory = options.directory.resolve()
    run("build", "--outdir", directory, ROOT)
    wheel, sdist = the_only(directory, "*.whl"), the_only(directory, "*.tar.gz")
    version = wheel.name.split("-")[1]
    if options.tag:
        check_tag(options.tag, version)
    check_wheel(wheel, version)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as scratch:
        run("build", "--wheel", "--outdir", scratch, ROOT)
        from_tree = contents(the_only(Path(scratch), "*.whl"))
    assert contents(wheel) == from_tree, "the sdist gives another wheel than the tree"
    run("twine", "check", "--strict", sdist, wheel)


if __name__ == "__main__":
    main()
