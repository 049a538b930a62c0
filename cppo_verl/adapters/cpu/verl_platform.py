"""A CPU platform for unmodified verl (``verl.plugins`` entry point), active where ``VERL_PLATFORM=cpu``.

verl knows cuda and npu only. This registers a third platform through verl's own registry and mends from outside the
places where a missing accelerator would stop it; each says what it mends.
"""

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def active() -> bool:
    """Whether this process was asked to run verl on the CPU."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def _resident_bytes(*_: Any) -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes(*_: Any) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _reset_peak(*_: Any) -> None:
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # Linux: the peak resident set starts again at the present one


def _memory_info(*_: Any) -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


class _CpuDeviceModule(types.ModuleType):
    """torch.cpu with the accelerator calls verl makes on its device module: memory is this process's resident set."""

    memory_allocated = memory_reserved = staticmethod(_resident_bytes)
    max_memory_allocated = max_memory_reserved = staticmethod(_peak_resident_bytes)
    reset_peak_memory_stats = staticmethod(_reset_peak)
    mem_get_info = staticmethod(_memory_info)
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: torch.device("cpu"))
    get_device_name = staticmethod(lambda *_: "CPU")
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))

    @staticmethod
    def _nothing(*_: Any) -> None:
        """Calls that only steer an accelerator (torch's global seed covers the CPU generator)."""

    set_device = synchronize = empty_cache = ipc_collect = _nothing
    manual_seed = manual_seed_all = _nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """verl's platform interface on the CPU: gloo, shared-memory weight transfer, Ray "GPU" slots without hardware."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuDeviceModule("cppo_verl_cpu_device")

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never by auto-detection; VERL_PLATFORM=cpu asks for it

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # a slot that ray_init.num_gpus declares; verl's worker groups and vLLM servers ask for it

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False  # makes verl send weights through shared memory

    def rollout_env_vars(self) -> dict[str, str]:
        return {}

    def cudart(self) -> None:
        return None


def _install() -> None:
    # verl registers its FSDP engines for cuda and npu; this is its own override of the lookup.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")

    # verl would ask torch for "cpu:gloo,cpu:gloo", which names one device twice and is refused.
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> Any:
        _unpin_offload()
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def _unpin_offload() -> None:
    """verl's fsdp2 reference policy offloads to pinned memory, which needs an accelerator."""
    import verl.workers.engine.fsdp.transformer_impl as engine
    from torch.distributed.fsdp import CPUOffloadPolicy

    engine.CPUOffloadPolicy = lambda pin_memory=True: CPUOffloadPolicy(pin_memory=False)


if active():
    _install()
