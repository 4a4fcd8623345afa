"""Runs with subsets: a task that does not fit the model is refused by its path."""

import pytest

from omniform.modeling.config import ConfigError, parse_config
from omniform.training.config import TrainConfig


@pytest.mark.parametrize(
    ("model", "task", "stages", "message"),
    [
        (
            "subsets: {a: {input_budget: 1, target_budget: 1}}",
            "text->image",
            "",
            r"data\.sources\.0 \(x\): the task text->",
        ),
        (
            "",
            "text+image~a",
            "",
            r"data\.sources\.0 \(x\): the task text\+image~a needs model\.subsets\.a; there is none",
        ),
        (
            "subsets: {a: {input_budget: 1, target_budget: 1}}",
            "text+image~a",
            "stages: [{name: s, mixture: {x: {tasks: {text+image~b: 1}}}}]",
            r"stages\.0\.mixture: data\.sources\.0 \(x\): the task text\+image~b needs model\.subsets\.b; there is a",
        ),
        (
            "subsets: {a: {input_budget: 1, target_budget: 1}}",
            "text+video~a",
            "",
            r"the task text\+video~a is about video, but model\.objectives is for text, image",
        ),
        (
            "subsets: {a: {input_budget: 1, target_budget: 1}}",
            "text~a",
            "",
            r"the task text~a is about text alone: a task of model\.subsets\.a is about two or more",
        ),
        (
            "subsets: {a: {input_budget: 1, target_budget: 1, input_alpa: 1}}",
            "text+image~a",
            "",
            r"model\.subsets\.a\.input_alpa: unknown key; did you mean input_alpha",
        ),
        (
            "subsets: {a: {input_budget: -1, target_budget: 1}}",
            "text+image~a",
            "",
            r"model\.subsets\.a\.input_budget: Input should be greater than or equal to 0",
        ),
    ],
)
def test_a_run_is_refused_by_the_path_of_its_task(model: str, task: str, stages: str, message: str) -> None:
    text = f"""
name: x
steps: 2
{stages}
tokenizers: {{}}
model:
  objectives: {{text: next_token, image: masked}}
  {model}
data: {{sources: [{{path: x, tasks: {{{task}: 1}}}}]}}
"""
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainConfig, text)


@pytest.mark.parametrize(
    ("budgets", "refused"),
    [
        ("input_budget: 8, input_alpha: {text: 1.0}", True),
        ("input_budget: [0, 8], input_alpha: {text: 1.0}", False),
        ("input_budget: 8, input_alpha: 0.1", False),
        ("input_budget: [0, 8], target_alpha: {text: 1.0}", True),
    ],
)
def test_guidance_needs_a_budget_that_leaves_conditions_out(budgets: str, refused: bool) -> None:
    text = f"""
name: x
steps: 2
tokenizers: {{}}
model:
  objectives: {{text: next_token, image: masked}}
  subsets: {{a: {{target_budget: 8, {budgets}}}}}
data: {{sources: [{{path: x, tasks: {{text+image~a: 1}}}}]}}
generation: {{image: {{guidance_scale: 2.0}}}}
"""
    if refused:
        with pytest.raises(ConfigError, match=r"generation\.image\.guidance_scale is 2\.0, .* let the input_budget"):
            parse_config(TrainConfig, text)
    else:
        assert parse_config(TrainConfig, text).model.subsets
    with pytest.raises(ConfigError, match=r"model\.subsets\.a\.input_budget.*: Input should be less than"):
        parse_config(
            TrainConfig,
            text.replace("8, input", "99999999999999999999, input"),
            [f"model.subsets.a.input_budget={10**20}"],
        )
