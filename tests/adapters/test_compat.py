"""The seams to verl and vLLM: present in the installed packages and in both vLLM versions, and missed when they go."""

import importlib.util
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cppo_verl.adapters import compat

GPU_VLLM = "0.24.0"


def test_installed_packages_have_every_seam():
    compat.check()


def test_installed_vllm_is_the_tested_cpu_version():
    package = Path(importlib.util.find_spec("vllm").origin).parent
    assert compat.source_mismatches(package) == []


def test_the_driver_does_not_import_vllms_models():
    """A second and more of a start, while the actor and the server import."""
    code = "import sys, cppo_verl.adapters.driver.modes; print('vllm.model_executor' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False"


@pytest.fixture(scope="session")
def gpu_vllm(tmp_path_factory):
    """Sources of the vLLM that GPUs use, out of its wheel (280 MB from the package index)."""
    folder = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    platform = ["--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run([*command, *platform, f"vllm=={GPU_VLLM}"], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"vLLM {GPU_VLLM} cannot be downloaded here: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            folder, [file for file in archive.namelist() if file.startswith("vllm/") and file.endswith(".py")]
        )
    wheel.unlink()
    return folder / "vllm"


def test_gpu_vllm_has_every_seam(gpu_vllm):
    assert compat.source_mismatches(gpu_vllm) == []


def test_a_renamed_parameter_is_missed(tmp_path):
    package = tmp_path / "vllm"
    (package / "model_executor" / "layers").mkdir(parents=True)
    (package / "sampling_params.py").write_text("class SamplingParams:\n    seed: int\n")
    (package / "model_executor/layers/utils.py").write_text("def dispatch_cpu_unquantized_gemm(layer, drop): ...\n")
    (package / "v1/engine").mkdir(parents=True)
    (package / "v1/engine/async_llm.py").write_text(
        "class AsyncLLM:\n    async def generate(self, prompt, params, request_id): ...\n"
    )
    (package / "v1/engine/output_processor.py").write_text(
        "class RequestState:\n    def from_new_request(self):\n        logprobs = logprobs_processor.of(request)\n"
    )
    problems = "\n".join(compat.source_mismatches(package))
    assert "SamplingParams lacks logprobs" in problems
    assert "dispatch_cpu_unquantized_gemm lacks remove_weight" in problems
    assert "generate lacks sampling_params" in problems
    assert "RequestState lacks LogprobsProcessor" in problems
    assert "LogprobsLists lacks logprob_token_ids, logprobs" in problems


def test_a_changed_verl_signature_is_reported(monkeypatch):
    from verl.workers.engine_workers import TrainingWorker

    monkeypatch.setattr(TrainingWorker, "train_batch", lambda self, batch: None)
    with pytest.raises(compat.IncompatibleError, match="has no parameter data"):
        compat.check()


def test_another_verl_version_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.9.2")
    with pytest.raises(compat.IncompatibleError, match=r"verl 0\.9\.2 is installed.*pip install verl==0\.9\.1"):
        compat.check()


def test_verls_separate_async_logs_what_no_logger_takes(caplog):
    """When the first part fails verl has mended it, and ``compat.let_separate_async_log`` can go."""
    import inspect

    from verl.trainer.ppo.v1 import trainer_separate_async

    assert "flush=True" in inspect.getsource(trainer_separate_async.PPOTrainerSeparateAsync._setup)
    stock = trainer_separate_async.logger
    with pytest.raises(TypeError, match="flush"):
        stock.info("x", flush=True)
    try:
        compat.let_separate_async_log()
        with caplog.at_level(logging.INFO):
            trainer_separate_async.logger.info("disabled", flush=True)
        assert "disabled" in caplog.text
    finally:
        trainer_separate_async.logger = stock


def test_every_format_of_calls_is_a_parser_of_verls():
    from verl.experimental.agent_loop.tool_parser import ToolParser

    from cppo_verl.config.schema import TOOL_FORMATS

    assert sorted(ToolParser._registry) == sorted(TOOL_FORMATS)
