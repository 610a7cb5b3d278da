"""Compiles backbones to run fast on a device."""

from models.runtime.allocator import trim_allocator, tune_allocator
from models.runtime.compiler import CompiledBackbone, compile_backbone
from models.runtime.device import cpu_count, devices, memory, pick_device
from models.runtime.failures import device_works, is_device_lost, is_out_of_memory
from models.runtime.gpus import GpuProblem, gpu_problem
from models.runtime.options import Agreement, EngineTiming, Options, RuntimeInfo
from models.runtime.steps import BATCH_STEPS, batch_step, steps_up_to

__all__ = [
    "BATCH_STEPS",
    "Agreement",
    "CompiledBackbone",
    "EngineTiming",
    "GpuProblem",
    "Options",
    "RuntimeInfo",
    "batch_step",
    "compile_backbone",
    "cpu_count",
    "device_works",
    "devices",
    "gpu_problem",
    "is_device_lost",
    "is_out_of_memory",
    "memory",
    "pick_device",
    "steps_up_to",
    "trim_allocator",
    "tune_allocator",
]
