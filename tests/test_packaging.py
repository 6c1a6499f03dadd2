"""environment.yml, pyproject.toml, requirements.lock and run_all.sh agree, and the lock is complete."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pages
import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from hamlet import paths

SUPPORTED = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((paths.ROOT / "environment.yml").read_text())


@pytest.fixture(scope="module")
def lock() -> list[tuple[Requirement, list[str]]]:
    """Every entry of the lock with its hashes."""
    entries = []
    for line in paths.LOCK.read_text().replace("\\\n", " ").splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            requirement, *hashes = line.split("--hash=")
            entries.append((Requirement(requirement.strip()), [text.strip() for text in hashes]))
    return entries


def holds(marker: Marker | None, python: str, platform: str, machine: str) -> bool:
    if marker is None:
        return True
    values = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": platform}
    system = {"linux": "Linux", "darwin": "Darwin"}[platform]
    values |= {"platform_machine": machine, "platform_system": system, "implementation_name": "cpython"}
    return marker.evaluate(values | {"platform_python_implementation": "CPython", "extra": "", "os_name": "posix"})


def locked(lock, python: str, platform: str, machine: str) -> dict[str, Version]:
    """Package name -> version on one platform; two entries that both hold there are an error."""
    found: dict[str, Version] = {}
    for requirement, _ in lock:
        if holds(requirement.marker, python, platform, machine):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is locked twice for {python} on {platform} {machine}"
            (pin,) = requirement.specifier
            found[name] = Version(pin.version)
    return found


def test_every_entry_is_one_exact_version_with_hashes(lock):
    assert len(lock) > 100
    for requirement, hashes in lock:
        assert [pin.operator for pin in requirement.specifier] == ["=="], requirement
        assert requirement.url is None, requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), requirement


def test_the_lock_names_no_address():
    text = paths.LOCK.read_text()
    assert "://" not in text
    options = [line for line in text.splitlines() if line.startswith("-")]
    assert not options


@pytest.mark.parametrize("python", SUPPORTED)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_every_direct_dependency_is_locked(project, lock, python, platform, machine):
    versions = locked(lock, python, platform, machine)
    for text in project["dependencies"]:
        requirement = Requirement(text)
        if holds(requirement.marker, python, platform, machine):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize("python", SUPPORTED)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_exactly_one_faiss(lock, python, platform, machine):
    found = {name for name in locked(lock, python, platform, machine) if name.startswith("faiss")}
    assert found == {"faiss-gpu" if (platform, machine) == ("linux", "x86_64") else "faiss-cpu"}


def test_torch_and_torchvision_are_pinned_alike(project, lock):
    pins = {Requirement(text).name: Requirement(text).specifier for text in project["dependencies"]}
    versions = locked(lock, "3.11", "linux", "x86_64")
    for name in ("torch", "torchvision"):
        assert str(pins[name]) == f"=={versions[name]}"
    # torchvision 0.N goes with torch 2.(N - 15)
    assert versions["torchvision"].minor - versions["torch"].minor == 15


def test_the_environment_is_python_and_the_lock(project, environment):
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock"]
    assert {re.split(r"[ <>=]", entry)[0] for entry in conda} == {"python", "pip"}
    (python,) = [entry for entry in conda if entry.startswith("python ")]
    assert SpecifierSet(python.split()[1]) == SpecifierSet(project["requires-python"])


def test_the_supported_pythons_are_the_ones_that_run_all_looks_for(project):
    accepted = SpecifierSet(project["requires-python"])
    assert [v for v in ("3.10", *SUPPORTED, "3.14") if accepted.contains(v)] == list(SUPPORTED)
    script = (paths.ROOT / "run_all.sh").read_text()
    assert all(f"python{version}" in script for version in SUPPORTED)
    assert "(3, 11) <= sys.version_info < (3, 14)" in script


def test_the_scripts_are_executable_and_parse():
    for name in ("run_all.sh", ".ci/run"):
        path = paths.ROOT / name
        assert path.stat().st_mode & 0o111, name
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_licence_and_citation(project):
    assert project["license"] == "MIT"
    assert (paths.ROOT / "LICENSE").read_text().startswith("MIT License")
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "MIT" and citation["version"] == project["version"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["title"]


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_cluster_profiles_hold_known_options(name):
    """Every key of a cluster profile is an option of the installed Snakemake (plugin options apart)."""
    help_text = subprocess.run(
        [sys.executable, "-m", "snakemake", "--help"], capture_output=True, text=True, check=True
    ).stdout
    content = yaml.safe_load((paths.WORKFLOW / "profiles" / name / "config.yaml").read_text())
    unknown = [key for key in content if f"--{key}" not in help_text and key != "container-image"]
    assert not unknown


def test_the_installed_package_trains_and_searches_without_the_checkout(tmp_path):
    """The wheel's files as pyproject.toml lists them, imported from elsewhere by somebody with an empty home."""
    build = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site, home = tmp_path / "site", tmp_path / "home"
    for source, target in ({name: name for name in build["packages"]} | build["force-include"]).items():
        shutil.copytree(paths.ROOT / source, site / target, ignore=shutil.ignore_patterns("__pycache__"))
    pages.photos(tmp_path / "my-photos", classes=4, images=8)
    (tmp_path / "my-photos" / "one.jpg").unlink()
    moved = ("HAMLET_CACHE", "HAMLET_MODELS", "HAMLET_OUTPUT", "HAMLET_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    env = {key: value for key, value in os.environ.items() if key not in moved}
    env |= {"PYTHONPATH": str(site), "HOME": str(home), "OMP_NUM_THREADS": "1"}

    def hamlet(*words: str) -> str:
        command = [sys.executable, "-m", "hamlet", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(home) in hamlet("train", "my-photos", "--name", "mine", "--epochs", "1")
    assert "model mine" in hamlet("index", "my-photos", "index", "--model", "mine")
    assert "my-photos" in hamlet("search", "index", "class 1", "-k", "1")
    assert not (site / "data").exists() and not (site / "hamlet" / "share" / "data" / "cache").exists()
