# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib's zoo without any import by hand: each check in a fresh interpreter."""

import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import anomalib
import pytest

from anomalib_musc.startup import watch

ROOT = Path(__file__).resolve().parents[1]
PTH = (ROOT / "anomalib_musc/anomalib_musc.pth").read_text()


def run(code: str, python: Path | str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [str(python), "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def check(code: str, python: Path | str = sys.executable, **environment: str) -> str:
    """Run code that must succeed and return what it printed."""
    done = run(code, python, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORKS = """
import os, sys
import lightning.pytorch, open_clip, timm  # third parties, which take longest
for number, code in enumerate({snippets!r}):
    process = os.fork()
    if not process:
        os.environ.update({environment!r}[number])
        exec(code, {{"__name__": "__main__"}})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, code
"""


def check_each(*snippets: str, environment: dict[int, dict[str, str]] | None = None) -> None:
    """Run each piece of code in a fork of one interpreter that knows nothing of anomalib yet; all must succeed."""
    variables = [(environment or {}).get(number, {}) for number in range(len(snippets))]
    check(FORKS.format(snippets=[textwrap.dedent(snippet) for snippet in snippets], environment=variables))


def make_venv(folder: Path) -> tuple[Path, Path]:
    """Make an environment that sees our dependencies, but none of our site-packages' start-up files."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    (site_packages / "zz_dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin/python", site_packages


EVERY_NAME = """
        from anomalib.models import MuSc, get_model, list_models
        small = {"backbone": "test_vit", "pretrained": False}
        assert "mu_sc" in list_models() and "MuSc" in list_models(case="pascal")
        for name in ("musc", "MuSc", "mu_sc"):
            assert type(get_model(name, **small)) is MuSc
        for path in ("MuSc", "anomalib_musc.MuSc", "anomalib.models.MuSc"):
            assert type(get_model({"class_path": path, "init_args": small})) is MuSc
        import anomalib_musc
        assert anomalib_musc.MuSc is MuSc
        from anomalib.data import MVTec, MVTecAD, get_datamodule
        assert issubclass(MVTec, MVTecAD)
        assert type(get_datamodule({"class_path": "MVTec", "init_args": {"root": "/none"}})) is MVTec
    """
UNUSUAL_FINDERS_AND_LOADERS = """
        import sys
        from importlib.machinery import PathFinder

        class WithoutFindSpec:  # what Python before 3.12 still accepts
            def find_module(self, name, path=None):
                return None

        class SlottedLoader:
            __slots__ = ("loader",)
            def __init__(self, loader): self.loader = loader
            def create_module(self, spec): return None
            def exec_module(self, module): self.loader.exec_module(module)

        class Slotted:
            def find_spec(name, path=None, target=None):
                spec = PathFinder.find_spec(name, path, target) if name == "anomalib.models" else None
                if spec is not None:
                    spec.loader = SlottedLoader(spec.loader)
                return spec

        sys.meta_path[1:1] = [WithoutFindSpec(), Slotted] if sys.version_info < (3, 12) else [Slotted]
        from anomalib.models import MuSc
    """
SWITCHED_OFF = """
        import sys, anomalib.models
        assert not hasattr(anomalib.models, "MuSc")
        loaded = {name for name in sys.modules if name.startswith("anomalib_musc.")}
        assert loaded == {"anomalib_musc.startup", "anomalib_musc.compat", "anomalib_musc.compat.old_names"}
        from anomalib_musc import MuSc  # still there for who asks
        """
ANY_MODULE_FIRST = """
    import {first}
    import anomalib.models, anomalib_musc
    assert anomalib.models.MuSc is anomalib_musc.MuSc
    assert "anomalib_musc" in anomalib.models.ALLOWED_MODULES
"""
FIRST = ("output.prediction_writer", "compat.export", "pool.folder", "inference.detector", "torch_model")


def test_it_joins_in_every_way():
    """All names, odd finders, switched off, and modules that import anomalib's models themselves."""
    modules = [ANY_MODULE_FIRST.format(first=f"anomalib_musc.{name}") for name in FIRST]
    environment = {2: {"ANOMALIB_MUSC_ZOO": "0"}}
    check_each(EVERY_NAME, UNUSUAL_FINDERS_AND_LOADERS, SWITCHED_OFF, *modules, environment=environment)


@pytest.mark.parametrize("value", ["false", "no", "OFF"])
def test_ways_to_switch_it_off(value, monkeypatch):
    assert watch("anomalib.models", anomalib.__path__, None) is not None
    monkeypatch.setenv("ANOMALIB_MUSC_ZOO", value)
    assert watch("anomalib.models", anomalib.__path__, None) is None


def test_start_up_imports_nothing(tmp_path):
    python, site_packages = make_venv(tmp_path / "venv")
    code = "import sys; print(sorted(sys.modules))"
    before = check(code, python)
    (site_packages / "anomalib_musc.pth").write_text(PTH)
    assert check(code, python) == before
    assert check("import sys; print([f.__name__ for f in sys.meta_path][0])", python) == "AnomalibMuScFinder\n"


def test_a_missing_package_breaks_nothing(tmp_path):
    python, site_packages = make_venv(tmp_path / "venv")
    (site_packages / "anomalib_musc.pth").write_text(PTH)
    done = run(f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]; import anomalib.models", python)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_broken_zoo_only_warns(tmp_path):
    python, site_packages = make_venv(tmp_path / "venv")
    (site_packages / "anomalib_musc.pth").write_text(PTH)
    package = site_packages / "anomalib_musc"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "startup.py").write_text((ROOT / "anomalib_musc/startup.py").read_text())
    (package / "zoo.py").write_text("raise RuntimeError('out of order')")
    done = run("import anomalib.models; assert not hasattr(anomalib.models, 'MuSc'); print('fine')", python)
    assert done.stdout == "fine\n", done.stderr
    assert "MuSc could not join anomalib: anomalib_musc.zoo raised RuntimeError('out of order')" in done.stderr
