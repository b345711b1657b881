"""What the build decides before it compiles: architectures, which nvcc, and what it says of one it cannot use."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

import refine_ext

ROOT = Path(__file__).resolve().parent.parent
# The one beside Python first: a distribution's may be older than the project accepts.
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")

RELEASE = "75-real;80-real;86-real;89-real;90-real;100-real;120"


def script(tmp_path: Path, body: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs CMake commands after cmake/nvcc.cmake, with nothing but `path` to find programs on."""
    (tmp_path / "script.cmake").write_text(
        f'cmake_minimum_required(VERSION 3.26)\ninclude("{ROOT}/cmake/nvcc.cmake")\n{body}\n'
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDAHOSTCXX")}
    kept |= {} if path is None else {"PATH": path}
    return subprocess.run(
        [str(CMAKE), "-P", "script.cmake"],
        cwd=tmp_path,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def problem(tmp_path: Path, path: str, architectures: str = "80;90", **environment: str) -> str:
    """What refine_ext_find_nvcc finds wrong."""
    body = f'refine_ext_find_nvcc(nvcc found "{architectures}")\nmessage("problem: ${{found}}.")'
    done = script(tmp_path, body, path, **environment)
    assert done.returncode == 0, done.stderr
    return re.search(r"^problem: (.*)\.$", done.stderr, re.M).group(1)


def fake_nvcc(folder: Path, version: str = "13.0", known: str = "75 80 86 90 120", build: str = "exit 0") -> Path:
    """A program that answers as nvcc does; `build` is what it does when asked to compile."""
    folder.mkdir(exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f'--version) echo "Cuda compilation tools, release {version}, V{version}.99";;\n'
        f"--list-gpu-arch) for a in {known}; do echo compute_$a; done;;\n"
        f"*) {build};;\nesac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def architectures(tmp_path: Path, request: str) -> subprocess.CompletedProcess:
    return script(tmp_path, f'refine_ext_architectures(result "{request}")\nmessage("${{result}}")')


def test_release_is_the_name_of_a_list(tmp_path):
    assert architectures(tmp_path, "release").stderr.strip() == RELEASE
    for given in ("80;90", "90a-real", "120-virtual", "100f", "native"):
        assert architectures(tmp_path, given).stderr.strip() == given


def test_architectures_that_are_none_are_refused(tmp_path):
    for given in ("sm_80", "80,90", "all", "80;Hopper", "90-ptx"):
        done = architectures(tmp_path, given)
        assert done.returncode != 0
        assert "is not an architecture; allowed are" in " ".join(done.stderr.split())


def test_a_good_nvcc_has_no_problem(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin")
    assert problem(tmp_path, str(nvcc.parent)) == ""
    assert problem(tmp_path, "", CUDACXX=str(nvcc)) == ""
    (tmp_path / "toolkit").mkdir()
    nvcc.parent.rename(tmp_path / "toolkit" / "bin")
    assert problem(tmp_path, "", CUDA_PATH=str(tmp_path / "toolkit")) == ""


def test_no_nvcc(tmp_path):
    assert problem(tmp_path, str(tmp_path)).startswith("no nvcc was found")


@pytest.mark.parametrize("version", ["11.8", "12.0", "12.6"])
def test_an_nvcc_too_old_for_the_sources(tmp_path, version):
    nvcc = fake_nvcc(tmp_path / "bin", version)
    assert problem(tmp_path, str(nvcc.parent)) == f"{nvcc} is of CUDA {version}; CUDA 12.8 or newer is needed"


def test_an_nvcc_that_does_not_know_an_architecture(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", "12.8")
    found = problem(tmp_path, str(nvcc.parent), RELEASE)
    assert found == f"{nvcc} of CUDA 12.8 does not know architecture 89; it knows 75, 80, 86, 90, 120"
    assert problem(tmp_path, str(nvcc.parent), "90a-real;120-virtual") == ""
    # Support dropped: CUDA 13 no longer compiles for Volta.
    assert "does not know architecture 70" in problem(tmp_path, str(nvcc.parent), "70")


def test_an_nvcc_that_refuses_the_host_compiler(tmp_path):
    refusal = 'echo "host_config.h:138:2: error: -- unsupported GNU version! gcc 99" >&2; exit 1'
    nvcc = fake_nvcc(tmp_path / "bin", build=refusal)
    found = problem(tmp_path, str(nvcc.parent))
    assert "cannot build a program with this host compiler" in found
    assert "unsupported GNU version! gcc 99" in found
    # The host compiler that is named is the one that is tried.
    choosy = f'case "$*" in *"-ccbin g++-14"*) exit 0;; esac; {refusal}'
    nvcc = fake_nvcc(tmp_path / "bin", build=choosy)
    assert "gcc 99" in problem(tmp_path, str(nvcc.parent))
    assert problem(tmp_path, str(nvcc.parent), CUDAHOSTCXX="g++-14") == ""


def test_something_else_named_nvcc(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin")
    nvcc.write_text("#!/bin/sh\necho hello\n")
    assert problem(tmp_path, str(nvcc.parent)) == f"{nvcc} --version does not answer as nvcc does"


def configure(tmp_path: Path, *arguments: str, path: Path) -> tuple[int, str]:
    """CMake's configure step on the whole project, and its words on one line."""
    if find_spec("pybind11") is None:
        pytest.skip("needs pybind11")
    import pybind11

    done = subprocess.run(
        [
            *(str(CMAKE), "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", *arguments),
        ],
        env={**os.environ, "PATH": os.pathsep.join([str(path), str(Path(sys.executable).parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_automatic_builds_for_the_cpu_with_a_warning_that_names_the_fault(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", "11.8")
    status, words = configure(tmp_path, path=nvcc.parent)
    assert status == 0, words
    assert f"CMake Warning at CMakeLists.txt:{line_of('message(WARNING')} (message):" in words
    fault = f"{nvcc} is of CUDA 11.8; CUDA 12.8 or newer is needed"
    assert f"building for the CPU only: {fault}" in words
    header = (tmp_path / "build" / "build_info.h").read_text()
    assert f'REFINE_EXT_CUDA_ABSENT R"absent({fault})absent"' in header
    assert re.search(r"#define CUDA_BUILT 0", header)
    # The next configuration looks again.
    fake_nvcc(tmp_path / "bin", "12.0")
    status, words = configure(tmp_path, path=nvcc.parent)
    assert status == 0 and "building for the CPU only" in words and "is of CUDA 12.0" in words


def line_of(text: str) -> int:
    lines = (ROOT / "CMakeLists.txt").read_text().split("\n")
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_asked_for_it_stops_with_what_to_do(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", "11.8")
    status, words = configure(tmp_path, "-DREFINE_EXT_CUDA=ON", path=nvcc.parent)
    assert status != 0
    assert f"REFINE_EXT_CUDA=ON, but {nvcc} is of CUDA 11.8" in words
    assert "CUDACXX=/path/to/nvcc" in words and "REFINE_EXT_CUDA=OFF" in words


def test_off_does_not_look(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", build=f"touch {tmp_path}/asked")
    status, words = configure(tmp_path, "-DREFINE_EXT_CUDA=OFF", path=nvcc.parent)
    assert status == 0, words
    assert "no CUDA library: REFINE_EXT_CUDA=OFF" in words
    assert not (tmp_path / "asked").exists()


def test_this_installation_says_what_was_built():
    build = refine_ext._C.build_info()
    library = Path(refine_ext.__file__).with_name("librefine_ext_cuda.so")
    if build["cuda"]:
        assert library.exists() and build["cuda_architectures"] and not build["cuda_absent"]
        # A release, with its seven architectures and PTX, stays within 100 MB.
        assert library.stat().st_size / len(build["cuda_architectures"]) * 8 < 100e6
    else:
        assert build["cuda_absent"] and not build["cuda_architectures"]


def test_the_version_has_one_source():
    """As the build backend reads it, by the pattern in pyproject.toml, and as CMake does."""
    pattern = re.search(r"^regex = '(.*)'$", (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert re.search(pattern, (ROOT / "CMakeLists.txt").read_text())["value"] == refine_ext.__version__


def dynamic_section(library: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    return subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout


def test_libraries_find_torch_beside_the_package():
    package = Path(refine_ext.__file__).parent
    for library in package.glob("librefine_ext_*.so"):
        section = dynamic_section(library)
        assert "$ORIGIN/../torch/lib" in section
        assert "[libtorch.so]" in section
        # One library for every Python.
        assert "libpython" not in section
    (module,) = package.glob("_C*.so")
    assert module.name == "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    assert "[librefine_ext_ops.so]" in dynamic_section(module) and "[$ORIGIN]" in dynamic_section(module)
    assert "libcudart" not in "".join(dynamic_section(library) for library in package.glob("*.so"))


def test_what_a_wheel_installs():
    try:
        package = importlib.metadata.distribution("refine-ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("refine-ext is not installed as a package")
    assert package.version == refine_ext.__version__
    assert package.metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.10" in package.metadata.get_all("Requires-Dist")
    (tag,) = re.findall(r"^Tag: (.*)$", package.read_text("WHEEL"), re.M)
    assert tag.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}-") and "linux" in tag
    files = [str(file) for file in package.files if "__pycache__" not in str(file)]
    assert {"refine_ext/librefine_ext_ops.so", "refine_ext/py.typed", "refine_ext/_C.pyi"} <= set(files)
    folders = {file.split("/")[0] for file in files}
    assert folders <= {"refine_ext", f"refine_ext-{package.version}.dist-info", ".."}, folders
