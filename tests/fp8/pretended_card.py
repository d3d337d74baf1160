"""What a card would meet in a process of its own, written to FOLDER/results.json; for test_driver.py.

    python pretended_card.py FOLDER        # TRITON_INTERPRET unset; FOLDER is empty

Paddle is told that it was built with CUDA and has two cards, and libcuda is a library of a few lines that
counts launches and keeps the stream of the last one. All else is real: Triton compiles kernels and, with the
C compiler, its bridge to libcuda and its launchers, loads and calls them. Each scenario runs in a fork.
"""

import ctypes
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path

LIBCUDA = """
struct config { unsigned grid[3], block[3], shared; void *stream; };
static int launches = 0, error = 0, loading_error = 0; static long stream = 0;
int launch_count(void) { return launches; }
long last_stream(void) { return stream; }
void fail_launches(int code) { error = code; }
int cuLaunchKernelEx(struct config *c, void *f, void **p, void **e) {
    launches++; stream = (long)c->stream; return error; }
int cuGetErrorString(int code, const char **text) { *text = "an illegal address"; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int what, void *f) { *value = 1024; return 0; }
int cuPointerGetAttribute(unsigned long *to, int what, unsigned long from) { *to = from; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **m, const void *data) { *m = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)1; return 0; }
""" + "".join(
    f"int {name}(void) {{ return 0; }}\n"
    for name in (
        *("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain_v2", "cuCtxSetCurrent"),
        *("cuCtxGetLimit", "cuCtxSetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig"),
        *("cuOccupancyMaxActiveClusters", "cuTensorMapEncodeTiled"),
    )
)
CAPABILITIES = ((9, 0), (8, 0))  # of gpu:0 and gpu:1
CALLS, MEDIANS = 100, 7
folder = Path(sys.argv[1])
current = 0  # index of Paddle's current card
words = []  # what the backend logs


class NoTorch(types.ModuleType):
    """In the place of torch: whoever asks it for anything is wrong here."""

    def __getattr__(self, name):
        raise AssertionError(f"torch.{name} was asked for")


class Event:
    """One millisecond from each to the next."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, later):
        return 1.0


def build_libcuda():
    source = folder / "libcuda.c"
    source.write_text(LIBCUDA)
    command = ["cc", source, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    return ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


def enter_package():
    """ppcoat.fp8 without ppcoat's __init__, which imports Triton through paddlenlp."""
    package = Path(__file__).parents[2] / "ppcoat"
    spec = importlib.util.spec_from_file_location(
        "ppcoat", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules["ppcoat"] = importlib.util.module_from_spec(spec)
    return spec


def pretend_cuda():
    """Two cards, and tensors that claim to lie on the current one."""
    cuda, yes = paddle.device.cuda, lambda *_: True
    paddle.is_compiled_with_cuda = paddle.device.is_compiled_with_cuda = yes
    paddle.get_device = paddle.device.get_device = lambda *_: f"gpu:{current}"
    paddle.CUDAPinnedPlace, paddle.CUDAPlace = paddle.CPUPlace, lambda index: f"place {index}"
    cuda.Event, cuda.synchronize = Event, lambda *_: None
    cuda.device_count = lambda: len(CAPABILITIES)
    cuda.get_device_capability = lambda device=None: CAPABILITIES[current if device is None else device]
    cuda.get_device_name = lambda *_: "pretended"
    paddle.base.libpaddle._get_current_raw_stream = lambda device: 1000 + device
    backend._on_gpu = yes
    backend.Op.check = lambda self, candidate: 0.0 * len(candidate(*arguments()))  # nothing is computed here
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())
    logging.getLogger("ppcoat").addHandler(handler)


def arguments(group=128):
    return paddle.ones([4, 128]), E4M3, group


def called(group=128):
    """One call of an op -> launches that it made, whether its results are the reference's, all that was said.
    group None needs another kernel and another launcher."""
    before = libcuda.launch_count()
    codes, scale = quantize.quantize(*arguments(group))
    right = bool((codes == 0x7E).all()) and bool((scale * 448 == 1).all())
    return {"launches": libcuda.launch_count() - before, "right": right, "words": list(words)}


def starts():
    """One launch through Paddle's driver: torch unasked, sys.meta_path as it was."""
    finders = list(sys.meta_path)
    quantize.quantize.verdict("triton")
    found = called()
    import triton

    driver = triton.runtime.driver.active
    sys.modules["ppcoat.fp8.driver_triton"].FLUSHED = 1024
    return found | {
        "driver": type(driver).__module__,
        "finders": sys.meta_path == finders,
        "stream": libcuda.last_stream(),
        "active": driver.is_active(),
        "place": driver.get_active_torch_device(),
        "benchmarked": driver.get_benchmarker()(called, warmup=1, rep=1),
    }


def starts_after_the_package():
    """Triton was imported long before it gets its driver."""
    not_connected()
    return starts()


def not_connected():
    """As if no op had run yet in this process."""
    import triton

    triton.runtime.driver = triton.runtime.driver.__class__()
    for name in ("triton.runtime.jit", "triton.compiler.compiler"):
        sys.modules[name].driver = triton.runtime.driver
    backend._triton_trouble.cache_clear()
    for op in backend.OPS.values():
        op._verdicts.clear(), op._functions.clear()


def nothing_built():
    not_connected()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)


def costs():
    """Microseconds of an op call beyond those of its launcher: the least of a few medians."""
    x = arguments()
    launcher = quantize.quantize.version("triton")

    def median(function):
        times = []
        for _ in range(CALLS):
            began = time.perf_counter()
            function(*x)
            times.append(1e6 * (time.perf_counter() - began))
        return statistics.median(times)

    called()
    finders = len(sys.meta_path)
    beyond = min(median(quantize.quantize) - median(launcher) for _ in range(MEDIANS))
    return called() | {"beyond": beyond, "finders": len(sys.meta_path) - finders}


def other_card():
    """What is current is asked anew: stream and capability of gpu:1."""
    global current
    from ppcoat.fp8.formats_triton import capability

    called()
    first, current = (libcuda.last_stream(), capability()), 1
    called()
    return {"first": first, "second": (libcuda.last_stream(), capability()), "words": list(words)}


def without_compiler():
    nothing_built()
    os.environ["PATH"] = str(folder)
    os.environ.pop("CC", None)
    return called() | {"reason": backend.unavailable("triton")}


def with_wrong_compiler():
    nothing_built()
    os.environ["CC"] = str(folder / "cc")
    return called() | {"reason": backend.unavailable("triton")}


def without_headers():
    nothing_built()
    paths = sysconfig.get_paths()
    sysconfig.get_paths = lambda *_, **__: {**paths, "include": str(folder)}
    return called() | {"reason": backend.unavailable("triton")}


def compiler_goes():
    """When the first kernel is built; the next needs it."""
    first = called()
    os.environ["PATH"] = str(folder)
    return {"first": first, "second": called(None), "third": called()}


def ptxas_fails():
    called()
    from triton.backends.nvidia import compiler

    compiler.get_ptxas = lambda: types.SimpleNamespace(path="false", version="12.8")
    return called(None)


def cache_is_full():
    """Or its folder is not to be written to."""
    called()
    os.environ["TRITON_CACHE_DIR"] = "/proc/nowhere"
    return called(None)


def raised(function):
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def launch_fails():
    called()
    libcuda.fail_launches(700)
    return {"raised": raised(called), "words": list(words)}


def interrupted():
    called()
    from triton.runtime import build

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    build._build = interrupt
    return {"raised": raised(lambda: called(None)), "words": list(words)}


def benchmark():
    """`benchmark kernels` up to its first launch, which fails."""
    from ppcoat.cli.main import main

    not_connected()
    libcuda.fail_launches(999)
    before = libcuda.launch_count()
    argv = ["benchmark", "kernels", "--output", str(folder / "kernels.json")]
    return {"raised": raised(lambda: main(argv)), "launches": libcuda.launch_count() - before}


def fp8_products():
    """Whether the library's own FP8 product is given on gpu:0 (sm_90) and gpu:1 (sm_80)."""
    global current
    from ppcoat.bench.kernel_library import PaddleLibrary

    on_sm_90 = PaddleLibrary().scaled_fp8_matmul(16, 16, 16)
    current = 1
    on_sm_80 = PaddleLibrary().scaled_fp8_matmul(16, 16, 16)
    return {"given": [on_sm_90 is not None, on_sm_80 is not None]}


def fork(scenario):
    """A copy of this process runs the scenario -> the end of a pipe from which its result can be read."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writing, json.dumps(scenario()).encode())
        except BaseException as error:
            os.write(writing, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(0)
    os.close(writing)
    return reading


def result(reading):
    with open(reading) as answer:
        text = answer.read()
    os.wait()
    return json.loads(text or '{"error": "it died"}')


libcuda = build_libcuda()
package = enter_package()
import paddle  # noqa: E402

from ppcoat.fp8 import backend, quantize  # noqa: E402
from ppcoat.fp8.formats import E4M3  # noqa: E402

pretend_cuda()
before = starts()
package.loader.exec_module(sys.modules["ppcoat"])  # import ppcoat
import ppdiffusers  # noqa: E402, F401, and with it paddlenlp and Triton's users

sys.modules["torch"] = NoTorch("torch")
results = {"starts_before_the_package": before, "goes_on": called()}
for scenario in (
    *(starts_after_the_package, costs, other_card, without_compiler, with_wrong_compiler, without_headers),
    *(compiler_goes, ptxas_fails, cache_is_full, interrupted, launch_fails, benchmark, fp8_products),
):
    results[scenario.__name__] = result(fork(scenario))
(folder / "results.json").write_text(json.dumps(results))
