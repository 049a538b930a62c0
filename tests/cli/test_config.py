"""Composition, one line per method, and refusals that name the setting, what is wrong and what to do."""

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cppo_verl.adapters import compat
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.problems import ConfigError

METHODS = {
    "cppo": ("Cppo", "topk_tv"),
    "dppo": ("Dppo", "topk_tv"),
    "grpo": ("Grpo", "topk_tv"),
    "minpro": ("MinPro", "topk_tv"),
    "cispo": ("Cispo", "topk_tv"),
    "trm_max": ("Trm", "topk_kl"),
    "trm_avg": ("Trm", "topk_kl"),
    "trm_max_avg": ("Trm", "topk_kl"),
    "drpo": ("Drpo", "binary_tv"),
    "gspo": ("Gspo", "topk_tv"),
    "gmpo": ("Gmpo", "topk_tv"),
    "sapo": ("Sapo", "topk_tv"),
    "aspo": ("Aspo", "topk_tv"),
    "opsm": ("Opsm", "topk_tv"),
    "m2po": ("M2po", "topk_tv"),
    "tis": ("ImportanceSampling", "topk_tv"),
    "mis": ("Banded", "topk_tv"),
    "icepop": ("Banded", "topk_tv"),
    "fipo": ("Fipo", "topk_tv"),
    "vespo": ("Vespo", "topk_tv"),
}


@pytest.fixture
def base(live_assets, tmp_path):
    return [
        "platform=cpu",
        "recipe=quickstart",
        f"quickstart.assets={live_assets}",
        f"run.dir={tmp_path}",
        "run.name=new",
    ]


def refusal(overrides):
    with pytest.raises(ConfigError) as caught:
        validate(configuration.compose(overrides))
    return str(caught.value)


def test_every_method_file_is_known_to_this_test():
    assert configuration.choices("method") == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_one_line_selects_a_method_with_its_own_divergence(base, name):
    config = configuration.compose([*base, f"method={name}"])
    validate(config)
    built = instantiate(config.method)
    assert (type(built).__name__, config.divergence.name) == METHODS[name]
    assert built.name == name
    policy_loss = config.actor_rollout_ref.actor.policy_loss
    assert OmegaConf.to_container(policy_loss.method) == OmegaConf.to_container(config.method)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param([], {"delta": 0.15, "delta_b": 0.015, "w_min": 0.8, "delta_b_quantile": None}, id="paper's TV"),
        pytest.param(["divergence=topk_kl"], {"delta": 0.1, "delta_b": 0.002}, id="KL instead of TV"),
        pytest.param(["divergence=binary_tv"], {"delta": 0.15, "delta_b": 0.015}, id="binary instead of Top-K"),
        pytest.param(["method=dppo", "divergence=binary_kl"], {"delta": 0.05}, id="DPPO's own KL"),
        pytest.param(["method=trm_max"], {"delta_max": 0.05, "delta_avg": None}, id="TRM-Max"),
        pytest.param(["method=trm_avg"], {"delta_max": None, "delta_avg": 0.001}, id="TRM-Avg"),
        pytest.param(["method=trm_max_avg"], {"delta_max": 0.1, "delta_avg": 0.002}, id="TRM-Max-Avg"),
        pytest.param(["method=grpo"], {"eps_low": 0.2, "eps_high": 0.28}, id="GRPO clip-higher"),
        pytest.param(["method=cispo"], {"eps_low": 1.0, "eps_high": 4.0}, id="CISPO"),
        pytest.param(
            ["method.delta_b=0.02", "method.delta_b_quantile=0.9"], {"delta_b_quantile": 0.9}, id="calibrated"
        ),
        pytest.param(["method.delta_b=null"], {"delta_b": None}, id="no prefix budget"),
    ],
)
def test_defaults_are_the_papers(base, overrides, expected):
    config = configuration.compose([*base, *overrides])
    validate(config)
    assert {name: config.method[name] for name in expected} == expected


def test_topk_is_the_default_divergence(base):
    """K = 20; a method that is defined on a KL names the Top-K KL; vLLM's own limit follows K."""
    config = configuration.compose(base)
    assert (config.divergence.name, config.divergence.k, config.divergence.log_prob_dtype) == ("topk_tv", 20, "float32")
    assert configuration.compose([*base, "method=trm_avg"]).divergence.name == "topk_kl"
    config = configuration.compose([*base, "divergence.k=33"])
    validate(config)
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs == 33


def test_fused_kernels_are_allowed_where_no_logits_are_read(base):
    overrides = [*base, "platform=gpu", "actor_rollout_ref.model.use_fused_kernels=true"]
    overrides.append("divergence=binary_tv")
    validate(configuration.compose(overrides))
    overrides.append("actor_rollout_ref.rollout.temperature=0.8")
    assert "impl_backend=torch) divide bfloat16 logits by it" in refusal(overrides)
    validate(configuration.compose([*overrides, "actor_rollout_ref.model.fused_kernel_options.impl_backend=triton"]))


def test_verls_keys_stay_reachable(base):
    config = configuration.compose([*base, "actor_rollout_ref.actor.optim.weight_decay=0.1", "trainer.save_freq=7"])
    assert config.actor_rollout_ref.actor.optim.weight_decay == 0.1
    assert config.trainer.save_freq == 7


def test_loss_is_equation_11_whatever_the_micro_batch(base):
    actor = configuration.compose([*base, "data.max_response_length=77"]).actor_rollout_ref.actor
    assert (actor.loss_agg_mode, actor.loss_scale_factor) == ("seq-mean-token-sum-norm", 77)


def test_a_reward_file_is_read_before_anything_starts(base, tmp_path):
    key = "reward.custom_reward_function"
    file = tmp_path / "mine.py"
    file.write_text("def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n")
    validate(configuration.compose([*base, f"{key}.path={file}", f"{key}.name=score"]))
    assert "mine.py does not define it" in refusal([*base, f"{key}.path={file}"])
    file.write_text("def score(:")
    assert "mine.py is not Python" in refusal([*base, f"{key}.path={file}"])


def test_a_file_of_tools_is_read_before_anything_starts(base, tmp_path, monkeypatch):
    path, loop = (
        "actor_rollout_ref.rollout.multi_turn.function_tool_path",
        "actor_rollout_ref.rollout.agent.default_agent_loop",
    )
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("from verl.tools.function_tool import function_tool\n\n@function_tool\ndef mine(): ...\n")
    config = configuration.compose([*base, f"{path}=mine.py", f"{loop}=cppo_tool_agent"])
    validate(config)
    assert config.actor_rollout_ref.rollout.multi_turn.function_tool_path == str(file)
    assert f"{loop}=cppo_single_turn uses no tools, but {path} is set" in refusal([*base, f"{path}={file}"])
    file.write_text("def mine(): ...\n")
    assert "mine.py has no function with @function_tool" in refusal(
        [*base, f"{path}={file}", f"{loop}=cppo_tool_agent"]
    )


def test_a_reward_file_is_found_from_the_workers(base, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def compute_score(): ...")
    monkeypatch.chdir(tmp_path)
    config = configuration.compose([*base, "reward.custom_reward_function.path=mine.py"])
    validate(config)
    assert config.reward.custom_reward_function.path == str(tmp_path / "mine.py")


REFUSED = [
    (["method=ppo"], "method=ppo: there is no such method; choose one of aspo, cispo, cppo"),
    (["divergence.k=0"], "divergence.k=0: topk_tv needs a number of tokens, 1 or more"),
    (["divergence.k=many"], "divergence.k=many: topk_tv needs a number of tokens"),
    (["divergence.k=56"], "has only 55 tokens"),
    (["divergence=binary_tv", "divergence.k=20"], "divergence.k=20: binary_tv needs k=0"),
    (["divergence.name=js"], "divergence.name=js: choose one of topk_tv"),
    (["divergence.log_prob_dtype=int8"], "divergence.log_prob_dtype=int8: use float32 or float16"),
    (["platform=gpu", "actor_rollout_ref.model.use_fused_kernels=true"], "never form the logits"),
    (
        ["platform=gpu", "divergence=binary_tv", "actor_rollout_ref.actor.strategy=veomni"],
        "strategy=veomni: its log-probabilities can be rounded to bfloat16",
    ),
    (["platform=gpu", "actor_rollout_ref.actor.pad_to_length=true"], "refuses it where the loss reads the logits"),
    (["actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=5"], "is less than divergence.k=20"),
    (
        ["actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent"],
        "only cppo_single_turn and cppo_tool_agent ask",
    ),
    (["actor_rollout_ref.rollout.agent.default_agent_loop=cppo_tool_agent"], "function_tool_path is not set"),
    (["actor_rollout_ref.rollout.multi_turn.function_tool_path=/no/tool.py"], "/no/tool.py does not exist"),
    (["actor_rollout_ref.rollout.multi_turn.format=xml"], "format=xml: give one of deepseek_v4"),
    (["actor_rollout_ref.rollout.disaggregation.enabled=true"], "disaggregation.enabled=true: set false"),
    (["reward.custom_reward_function.path=null"], "custom_reward_function.path is not set"),
    (["reward.custom_reward_function.path=/no/reward.py"], "/no/reward.py does not exist"),
    (["reward.custom_reward_function.path=pkg://cppo_verl.rewards"], "there is no module cppo_verl.rewards"),
    (["reward.reward_kwargs.overlong_buffer_cfg.enable=true"], "overlong_buffer_cfg.len=4096 must be between 1 and"),
    (["distillation.enabled=true"], "distillation.enabled=true: verl's distillation replaces the policy loss"),
    (["divergence=js"], "divergence=js: there is no such divergence; choose one of binary_kl"),
    (["method.detla=0.2"], "method.detla: there is no such setting, did you mean method.delta or method.delta_b?"),
    (["method=grpo", "method.delta=0.2"], "there is no such setting; method=grpo has eps_low, eps_high, name"),
    (["metod=grpo"], "metod: there is no such setting, did you mean method or mode?"),
    (["delta=0.2"], "delta: there is no such setting, did you mean method.delta or"),
    (["actor_rollout_ref.actor.optim.lrr=1"], "did you mean actor_rollout_ref.actor.optim.lr? (+actor_rollout_ref"),
    (["foo.bar=1"], "foo.bar: there is no such setting"),
    (["method.delta=0"], "method.delta must be > 0; got 0"),
    (["method.delta=-0.1"], "method.delta must be > 0; got -0.1"),
    (["method.delta=nan"], "method.delta must be > 0; got nan"),
    (["method.delta=big"], "method.delta: Value 'big' of type 'str' could not be converted to Float"),
    (["method.w_min=0"], "method.w_min must be in (0, 1]; got 0"),
    (["method.w_min=1.1"], "method.w_min must be in (0, 1]; got 1.1"),
    (["method.weights=random"], "method.weights must be one of"),
    (["method.delta_b=-1"], "method.delta_b must be >= 0, or null"),
    (["method.delta_b_quantile=90"], "method.delta_b_quantile must be in [0, 1]"),
    (["method=trm_max", "divergence=binary_tv"], "use divergence=topk_kl, or method.allow_tv=true"),
    (["method=trm_max", "method.delta_max=null"], "method.delta_max must be set, or delta_avg"),
    (["actor_rollout_ref.rollout.top_p=0.9"], "actor_rollout_ref.rollout.top_p=0.9"),
    (["actor_rollout_ref.rollout.top_k=20"], "top_k=20: training samples must come from the whole softmax"),
    (["trainer.use_v1=false"], "trainer.use_v1=false: verl's V0 trainer"),
    (["method=drpo", "divergence=topk_kl"], "divergence=topk_kl: drpo is defined on a total variation"),
    (["algorithm.rollout_correction.bypass_mode=false"], "bypass_mode=false: the trust region is anchored"),
    (["algorithm.adv_estimator=gae"], "advantages are group-relative; use grpo"),
    (["actor_rollout_ref.model.use_fused_kernels=true"], "fused kernels need a GPU"),
    (["actor_rollout_ref.actor.pad_to_length=true"], "needs model.use_remove_padding=true"),
    (["actor_rollout_ref.rollout.calculate_log_probs=false"], "log-probabilities are needed; set true"),
    (["actor_rollout_ref.rollout.n=1"], "a group of one has no relative advantage"),
    (["actor_rollout_ref.actor.ppo_mini_batch_size=7"], "must be a multiple of"),
    (["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=48"], "must divide the 128 responses of a minibatch"),
    (["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=null"], "ppo_micro_batch_size_per_gpu is not set"),
    (["actor_rollout_ref.actor.ppo_mini_batch_size=0"], "ppo_mini_batch_size=0: give a number of prompts, 1 or more"),
    (["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"], "is less than one copy of the model takes"),
    (
        ["trainer.n_gpus_per_node=6", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4"],
        "trainer.nnodes x trainer.n_gpus_per_node = 6 is not a multiple of the 4",
    ),
    (["trainer.n_gpus_per_node=3"], "ppo_mini_batch_size=8: its 128 responses cannot be divided over 3 data-parallel"),
    (
        ["actor_rollout_ref.rollout.tensor_model_parallel_size=16"],
        "n_gpus_per_node = 1 is not a multiple of a vLLM replica's 16",
    ),
    (["data.max_prompt_length=3"], "64 of 64 prompts have more tokens than data.max_prompt_length=3"),
    (
        ["trainer.total_training_steps=abc"],
        "trainer.total_training_steps=abc: give a number of steps, 1 or more, or null",
    ),
    (["trainer.v1.trainer_mode=hybrid"], "choose one of sync, colocate_async, separate_async by mode="),
    (["mode=async"], "there is no such mode; choose one of colocate_async, separate_async, sync"),
    (["mode=colocate_async", "run.staleness=1"], "run.staleness=1: how far mode=colocate_async lies behind"),
    (["run.staleness=-1"], "run.staleness=-1: give a number of steps, 0 or more"),
    (["mode=colocate_async", "actor_rollout_ref.rollout.full_determinism=true"], "set false, or mode=sync"),
    (["mode=separate_async", "data.train_batch_size=48"], "are not data.train_batch_size=48; give 6"),
    (["mode=separate_async", "actor_rollout_ref.rollout.n_gpus_per_node=0"], "give the servers devices of their own"),
    (["mode=separate_async", "actor_rollout_ref.rollout.n_gpus_per_node=two"], "n_gpus_per_node=two: give the servers"),
    (["mode=separate_async", "actor_rollout_ref.rollout.nnodes=null"], "nnodes=None: give the servers devices"),
    (["mode=separate_async", "trainer.n_gpus_per_node=two"], "trainer.n_gpus_per_node=two: give a number of GPUs"),
    (
        ["mode=separate_async", "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"],
        "it reaches servers on the training devices only",
    ),
    (["mode=separate_async", "actor_rollout_ref.rollout.nnodes=2"], "actor and servers must be on one node"),
    (["trainer.v1.sampler.max_off_policy_strategy=keep"], "give one of drop, wait"),
    (["actor_rollout_ref.actor.grad_clip=0.5"], "set actor_rollout_ref.actor.optim.clip_grad"),
    (["actor_rollout_ref.model.path=/no/such/model"], "actor_rollout_ref.model.path=/no/such/model does not exist"),
    (["actor_rollout_ref.model.path=null"], "actor_rollout_ref.model.path is not set"),
    (["data.train_files=/no/such/file.parquet"], "data.train_files: /no/such/file.parquet does not exist"),
    (["data.val_files=null"], "data.val_files is not set"),
    (["custom_reward_function.path=mine.py"], "set reward.custom_reward_function"),
    (["run.resume=true"], "run.resume=true, but there is no run"),
    (["run.name=a/b"], "a plain folder name is needed"),
    (["run.resume=maybe"], "use true, false or auto"),
    (["trainer.max_actor_ckpt_to_keep=0"], "give the number of newest checkpoints to keep, 1 or more, or null"),
    (["+trainer.remove_previous_ckpt_in_save=true"], "use trainer.max_actor_ckpt_to_keep=1 instead"),
    (["actor_rollout_ref.actor.checkpoint.async_save=true"], "cannot be told"),
    (["trainer.logger=[console,file]"], "every resume empties verl's file"),
    (["method._target_=no.such.Method"], "method._target_=no.such.Method cannot be imported"),
    (["method._target_=pathlib.Path"], "is not a dataclass of settings"),
    (["hydra.searchpath=[file:///x]"], "the path to verl's settings stands there"),
    (["method.horizon=0"], "method.horizon must be 1 or more tokens, or null; got 0"),
    (["trainer.save_freq=null"], "trainer.save_freq=None: give a number of steps, 0 or more, or -1"),
    (["trainer.test_freq=often"], "trainer.test_freq=often: give a number of steps, 0 or more, or -1"),
    (["data.train_files=[]"], "data.train_files is an empty list"),
    (["data.train_batch_size=null"], "data.train_batch_size=None: give a number of prompts, 1 or more"),
    (["actor_rollout_ref.rollout.n=null"], "actor_rollout_ref.rollout.n=None"),
    (["run.dir=null"], "run.dir=None: give a folder"),
    (["actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]"], "save_contents lacks model, optimizer, extra"),
    (
        ["actor_rollout_ref.actor.checkpoint.load_contents=[model,extra]"],
        "load_contents lacks optimizer: a resumed run",
    ),
    (["trainer.resume_mode=resume_path"], "trainer.resume_from_path is not set"),
    (["trainer.resume_mode=resume_path", "trainer.resume_from_path=no/global_step_1"], "global_step_1 does not exist"),
    (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/"], "give one of verl's global_step_N folders"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_refused_with_a_reason(base, overrides, message):
    assert message in refusal([*base, *overrides])


def test_megatrons_recipes():
    """Four cards cannot hold eight-fold expert parallelism; nowhere does set-up install Megatron-core."""
    thirty_billion = ["platform=gpu", "recipe=qwen3_30b_a3b_base"]
    absent = validate(configuration.compose(thirty_billion), planned=True)
    assert all(problem.only_here for problem in absent)
    strategy = [problem.text for problem in absent if problem.key == "actor_rollout_ref.actor.strategy"]
    assert "Megatron-core is not installed" in strategy[0]
    assert "Megatron-core is not installed" in refusal(thirty_billion)
    four = refusal([*thirty_billion, "trainer.nnodes=1", "trainer.n_gpus_per_node=4"])
    assert (
        "expert_model_parallel_size=8: trainer.nnodes x trainer.n_gpus_per_node = 4 is not a multiple of the 8" in four
    )


def test_the_length_of_the_run_alone_is_blamed(base):
    """The quickstart saves and validates every trainer.total_training_steps steps."""
    assert len(refusal([*base, "trainer.total_training_steps=abc"]).splitlines()) == 1


def test_some_prompts_may_be_too_long(base, tmp_path):
    """verl leaves them out; refused is only what leaves less than a batch."""
    chats = [[{"role": "user", "content": "1+1=" * (1 + 8 * (row % 2))}] for row in range(66)]
    write(tmp_path / "long.parquet", prompt=chats, data_source=["x"] * 66, reward_model=[GOLD] * 66)
    some = [*base, f"data.train_files={tmp_path / 'long.parquet'}"]
    validate(configuration.compose(some))
    assert "33 of 66 prompts have more tokens" in refusal([*some, "data.train_batch_size=64"])
    validate(configuration.compose([*some, "data.train_batch_size=64", "data.max_prompt_length=40"]))


def test_all_problems_are_reported_at_once(base):
    message = refusal([*base, "method.delta=0", "actor_rollout_ref.rollout.top_p=0.5", "run.name=.."])
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("recipe", "node"), [("quickstart", "quickstart"), ("tools", "quickstart"), ("smollm2", "smollm2")]
)
def test_what_a_recipe_has_not_made_yet_names_the_recipe(recipe, node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        validate(configuration.compose([f"recipe={recipe}", "platform=cpu"]))
    lines = str(caught.value).splitlines()
    hint = f"bash recipes/{recipe}.sh makes {node}.assets, runs/{recipe}-assets-SEED"
    assert sum(hint in line for line in lines) == 3  # the model and two files
    assert recipe == "tools" or len(lines) == 3  # the tools' file is not named there
    assert "cppo prepare" not in str(caught.value)


def test_run_name_in_use(base, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").touch()
    validate(configuration.compose(base))  # killed before its first file
    (tmp_path / "new" / "metrics.jsonl").touch()
    assert "run.name=new is in use" in refusal(base)
    OmegaConf.save(configuration.compose(base), tmp_path / "new/config.yaml", resolve=True)
    validate(configuration.compose([*base, "run.resume=true", "trainer.total_training_steps=50"]))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("method=dppo", "method"),
        ("divergence.k=10", "divergence"),
        ("run.seed=77", "run.seed"),
        ("actor_rollout_ref.model.path=elsewhere", "actor_rollout_ref.model.path"),
        ("data.train_batch_size=16", "data.train_batch_size"),
    ],
)
def test_resuming_as_another_experiment_is_refused(base, tmp_path, change, key):
    (tmp_path / "new").mkdir()
    OmegaConf.save(configuration.compose([*base, change]), tmp_path / "new/config.yaml", resolve=True)
    assert f"run.resume=true: {key} was " in refusal([*base, "run.resume=true"])


def test_a_colon_space_or_comma_in_a_path_is_only_a_path(live_assets, tmp_path):
    odd = tmp_path / "a (b), c"
    odd.symlink_to(live_assets)
    overrides = ["platform=cpu", "recipe=quickstart", f"quickstart.assets='{odd}'", f"run.dir='{tmp_path}/r (1), x'"]
    validate(configuration.compose(overrides))


def test_every_engine_batch_size_verl_asks_for_follows_from_one(base):
    """verl's own validation passes once ppo_micro_batch_size_per_gpu is given, with a reference policy too."""
    from verl.utils.config import validate_config

    config = configuration.compose([*base, "actor_rollout_ref.actor.use_kl_loss=true"])
    validate_config(config=config, use_reference_policy=True, use_critic=False)


def test_wrong_verl_version(base, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.8.0")
    assert "verl 0.8.0 is installed, but cppo_verl uses private parts of verl 0.9.1" in refusal(base)


def write(path, **columns):
    parquet.write_table(pa.table(columns), path)
    return path


CHAT = [{"role": "user", "content": "1+1?"}]
GOLD = {"ground_truth": "2", "style": "rule"}
MALFORMED = [
    ("not parquet", None, "is not a readable parquet file"),
    ("no gold column", {"prompt": [CHAT], "data_source": ["x"]}, "lacks the column reward_model"),
    ("text prompt", {"prompt": ["1+1?"], "data_source": ["x"], "reward_model": [GOLD]}, "not a list of chat messages"),
    ("no ground truth", {"prompt": [CHAT], "data_source": ["x"], "reward_model": [{"a": 1}]}, "without ground_truth"),
    (
        "another agent loop",
        {"prompt": [CHAT], "data_source": ["x"], "reward_model": [GOLD], "agent_name": ["tool_agent"]},
        "has a column agent_name, which would replace our agent loop",
    ),
    ("too few rows", {"prompt": [CHAT], "data_source": ["x"], "reward_model": [GOLD]}, "holds 1 problems, fewer than"),
]


@pytest.mark.parametrize(("columns", "message"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_malformed_data_file(base, tmp_path, columns, message):
    path = tmp_path / "train.parquet"
    if columns is None:
        path.write_text("hello")
    else:
        write(path, **columns)
    assert message in refusal([*base, f"data.train_files={path}"])


def test_modes_in_which_generation_and_training_overlap(base):
    lockstep, beside = (configuration.compose([*base, *mode]) for mode in ([], ["mode=separate_async"]))
    assert lockstep.trainer.v1.trainer_mode == "sync"
    assert lockstep.ray_kwargs.ray_init.num_gpus == 1
    validate(beside)
    engine = beside.actor_rollout_ref.rollout.checkpoint_engine
    assert (engine.backend, engine.custom_backend_module) == ("shared_memory", "cppo_verl.adapters.cpu.weights")
    assert beside.ray_kwargs.ray_init.num_gpus == 2  # slots: a trainer's and a server's
    on_gpus = configuration.compose(["platform=gpu", "mode=separate_async"]).actor_rollout_ref
    assert on_gpus.rollout.checkpoint_engine.backend == "nccl"
    assert not on_gpus.hybrid_engine
    validate(configuration.compose([*base, "mode=colocate_async"]))
