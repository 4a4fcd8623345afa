"""Where the norms of a block stand, against transformers' Gemma 2, the papers' formulas and what each norm hides."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from omniform.kernels.attention import DenseMask, attention_reference
from omniform.kernels.rmsnorm import rms_norm_reference
from omniform.kernels.rope import rotary_angles, rotate
from omniform.modeling.block import Block
from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, parse_config
from omniform.modeling.decoder import Decoder
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.vocabulary import Vocabulary

Tensors = Callable[[torch.Tensor], torch.Tensor]
PLACEMENTS = ("pre", "post", "sandwich", "sub_ln", "hybrid")
CONFIG = DecoderConfig(dim=12, n_layers=2, n_heads=3, n_kv_heads=3, ffn_dim=20, norm_eps=1e-12)
FORMULAS: dict[str, Callable[[torch.Tensor, Tensors, Tensors, Callable[[str], Tensors]], torch.Tensor]] = {
    "pre": lambda x, a, f, n: (y := x + a(n("attention_norm")(x))) + f(n("feed_forward_norm")(y)),
    "post": lambda x, a, f, n: n("feed_forward_norm")((y := n("attention_norm")(x + a(x))) + f(y)),
    "sandwich": lambda x, a, f, n: (
        (y := x + n("attention_out_norm")(a(n("attention_norm")(x))))
        + n("feed_forward_out_norm")(f(n("feed_forward_norm")(y)))
    ),
    "sub_ln": lambda x, a, f, n: (y := x + a(n("attention_norm")(x))) + f(n("feed_forward_norm")(y)),
    "hybrid": lambda x, a, f, n: (y := n("feed_forward_norm")(x + a(x))) + f(y),
}


def random_block(norm: str, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block(replace(CONFIG, norm=norm), layer=0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.4)
    return block


def run(block: Block, x: torch.Tensor) -> torch.Tensor:
    length = x.shape[1]
    positions = torch.arange(length)[None, :, None].expand(len(x), -1, 3)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(x), 1, -1, -1)
    return block(x, rotary_angles(positions, CONFIG.dim_per_head, CONFIG.rope_theta), DenseMask(causal), None)


def by_formula(block: Block, norm: str, x: torch.Tensor) -> torch.Tensor:
    """The block as the papers write it, from its weights alone."""
    w, length = dict(block.named_parameters()), x.shape[1]
    positions = torch.arange(length)[None, :, None].expand(len(x), -1, 3)
    rotary = rotary_angles(positions, CONFIG.dim_per_head, CONFIG.rope_theta)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(x), 1, -1, -1)

    def normed(name: str) -> Tensors:
        return lambda rows: rms_norm_reference(rows, w[f"{name}.weight"], CONFIG.norm_eps)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            rearrange(rows @ w[f"attention.{name}.weight"].T, "b l (h k) -> b h l k", h=CONFIG.n_heads)
            for name in ("query", "key", "value")
        )
        q, k = (rotate(normed(f"attention.{name}_norm")(z), *rotary) for name, z in (("query", q), ("key", k)))
        v = normed("attention.value_norm")(v) if norm == "hybrid" else v
        read = rearrange(attention_reference(q, k, v, causal), "b h l k -> b l (h k)")
        read = normed("attention.inner_norm")(read) if norm == "sub_ln" else read
        return read @ w["attention.out.weight"].T

    def feed(rows: torch.Tensor) -> torch.Tensor:
        inner = F.silu(rows @ w["feed_forward.gate.weight"].T) * (rows @ w["feed_forward.up.weight"].T)
        inner = normed("feed_forward.inner_norm")(inner) if norm == "sub_ln" else inner
        return inner @ w["feed_forward.down.weight"].T

    return FORMULAS[norm](x, attend, feed, normed)


@pytest.mark.parametrize("norm", PLACEMENTS)
@given(seed=st.integers(0, 99), length=st.integers(1, 6))
def test_a_block_is_its_papers_formula(norm: str, seed: int, length: int) -> None:
    block = random_block(norm, seed)
    x = torch.randn(2, length, CONFIG.dim)
    with torch.no_grad():
        torch.testing.assert_close(run(block, x), by_formula(block, norm, x), atol=1e-4, rtol=1e-4)


HIDDEN_SCALES = {
    "pre": set(),
    "post": set(),
    "sandwich": {"attention.value", "attention.out", "feed_forward.up", "feed_forward.down"},
    "sub_ln": {"attention.value", "feed_forward.up"},
    "hybrid": {"attention.value"},
}


@pytest.mark.parametrize("layer", ["attention.value", "attention.out", "feed_forward.up", "feed_forward.down"])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_a_norm_hides_the_scale_of_the_weights_before_it_and_of_no_others(norm: str, layer: str) -> None:
    block, x = random_block(norm), torch.randn(1, 5, CONFIG.dim)
    with torch.no_grad():
        before = run(block, x)
        block.get_parameter(f"{layer}.weight").mul_(3.0)
        same = torch.allclose(before, run(block, x), atol=1e-4, rtol=1e-4)
    assert same == (layer in HIDDEN_SCALES[norm])


@pytest.mark.parametrize("norm", PLACEMENTS)
def test_hidden_states_reach_the_heads_at_one_scale(norm: str) -> None:
    """Whatever blocks add: by the norm after the last one, or with post-norm by the last block's own."""
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, norm=norm))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=3.0)
    positions = torch.arange(5)[None, :, None].expand(1, -1, 3)
    hidden = decoder(50 * torch.randn(1, 5, CONFIG.dim), positions, DenseMask(torch.ones(1, 1, 5, 5).bool().tril()))
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(1, 5))
    assert ("norm.weight" in dict(decoder.named_parameters())) == (norm != "post")


def test_sandwich_equals_gemma_2(vocabulary: Vocabulary) -> None:
    """Gemma 2 adds 1 to the scales of norms and multiplies embeddings by sqrt(dim)."""
    decoder = DecoderConfig(
        dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, qk_norm=False, norm="sandwich", norm_eps=1e-6
    )
    ours = UnifiedModel(ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked()}), vocabulary)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocabulary.size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            hidden_activation="silu",
            rms_norm_eps=1e-6,
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    names = {
        "interface.embedding": "model.embed_tokens",
        "interface.head": "lm_head",
        "decoder.norm": "model.norm",
        "decoder.blocks": "model.layers",
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_out_norm": "post_feedforward_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    }
    shared = {}
    for name, weight in ours.state_dict().items():
        for mine, theirs in names.items():
            name = name.replace(mine, theirs)
        shared[name] = weight - 1 if weight.ndim == 1 else weight
    shared["model.embed_tokens.weight"] = shared["model.embed_tokens.weight"] / 32**0.5
    gemma.load_state_dict(shared, strict=True)
    token_ids = torch.randint(0, 50, (2, 11))
    with torch.no_grad():
        begin = torch.full_like(token_ids[:, :1], vocabulary.begin("text"))
        expected = gemma(torch.cat([begin, token_ids], dim=1)).logits[:, 1:, :50]
        torch.testing.assert_close(ours.text_logits(token_ids), expected, atol=2e-5, rtol=0)


def test_the_names_of_a_model_without_a_placement_are_those_of_pre() -> None:
    text = "objectives: {text: next_token}\ndecoder: {n_layers: 1}"
    assert parse_config(ModelConfig, text).decoder.norm == "pre"
    assert [name for name, _ in Decoder(DecoderConfig(n_layers=1)).named_parameters()] == [
        "blocks.0.attention_norm.weight",
        *(f"blocks.0.attention.{name}.weight" for name in ("query", "key", "value", "out", "query_norm", "key_norm")),
        "blocks.0.feed_forward_norm.weight",
        *(f"blocks.0.feed_forward.{name}.weight" for name in ("gate", "up", "down")),
        "norm.weight",
    ]


def test_hybrid_needs_the_norms_of_queries_and_keys() -> None:
    with pytest.raises(ConfigError, match=r"decoder: norm is hybrid.* qk_norm: false: leave it true"):
        parse_config(ModelConfig, "objectives: {text: next_token}\ndecoder: {norm: hybrid, qk_norm: false}")
