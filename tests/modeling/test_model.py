import pytest
import torch
from strategies import CODEBOOK, TEXT_SIZE, image_part, text_part
from transformers import LlamaConfig, LlamaForCausalLM

from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Role
from omniform.tokenizers.base import Discrete
from omniform.tokenizers.vocabulary import IdRange, Vocabulary, VocabularyError


def test_logits_equal_those_of_transformers_llama_on_shared_weights() -> None:
    vocabulary = Vocabulary(60, {})
    decoder = DecoderConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, qk_norm=False, norm_eps=1e-6)
    ours = UnifiedModel(ModelConfig(decoder=decoder, objectives={"text": NextToken()}), vocabulary).eval()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary.size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
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
        "feed_forward_norm": "post_attention_layernorm",
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
        shared[name] = weight
    llama.load_state_dict(shared, strict=True)
    token_ids = torch.randint(0, 60, (2, 11))
    with torch.no_grad():
        begin = torch.full_like(token_ids[:, :1], vocabulary.begin("text"))
        expected = llama(torch.cat([begin, token_ids], dim=1)).logits[:, 1:, :60]
        torch.testing.assert_close(ours.text_logits(token_ids), expected, atol=2e-5, rtol=0)


def test_text_logits_are_causal_and_refuse_ids_that_are_not_text(model: UnifiedModel) -> None:
    token_ids = torch.randint(0, TEXT_SIZE, (1, 6), generator=torch.Generator().manual_seed(0))
    changed = token_ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % TEXT_SIZE
    with torch.no_grad():
        before, after = model.text_logits(token_ids), model.text_logits(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-6, rtol=0)
    assert (before[:, 3:] - after[:, 3:]).abs().min() > 0
    with pytest.raises(VocabularyError, match="text"):
        model.text_logits(torch.tensor([[model.vocabulary.end]]))


def test_head_logits_of_a_range_are_columns_of_the_whole(model: UnifiedModel) -> None:
    hidden = torch.randn(3, 24)
    whole = model.logits(hidden, IdRange(0, model.vocabulary.size))
    part = model.vocabulary.target_range("image")
    torch.testing.assert_close(model.logits(hidden, part), whole[:, part.start : part.stop])
    assert whole.shape[1] == model.vocabulary.size


def test_every_parameter_takes_part_whichever_modality_is_absent(model: UnifiedModel) -> None:
    """ZeRO-3 hangs if a rank skips a module: an absent modality must still run, and change nothing."""
    sequence = MultimodalSequence.build([text_part([1, 2], Role.TARGET)], model.vocabulary, model.config.objectives)
    batch = corrupt(pack([[sequence], []], 8, model.vocabulary), model.vocabulary, model.config.objectives)
    losses = model(batch)
    assert list(losses) == ["text", "image"]
    assert losses["image"].item() == 0
    n_rows = 1 + 2 + 1  # marker, ids, end; no padding
    of_routers = {"router_balance": n_rows, "router_z": n_rows}
    assert batch.counts == {"text": 3.0, "image": 0.0, "next_span": 0.0, **of_routers}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_empty_batch_runs_all_modules_and_gives_zero_gradients(model: UnifiedModel) -> None:
    batch = corrupt(pack([[]], 4, model.vocabulary), model.vocabulary, model.config.objectives)
    sum(model(batch).values()).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_mixed_objectives_train_in_one_step(model: UnifiedModel) -> None:
    parts = [text_part([3, 4], Role.TARGET), image_part([0, 1, 2, 3], Role.TARGET)]
    sequence = MultimodalSequence.build(parts, model.vocabulary, model.config.objectives)
    batch = corrupt(pack([[sequence]], 16, model.vocabulary), model.vocabulary, model.config.objectives)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = None
    for _ in range(200):
        losses = model(batch)
        first = first or {k: v.item() for k, v in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(losses[k].item() < 0.05 * first[k] for k in losses)


def test_what_follows_a_span_is_learnt_where_it_has_a_weight(vocabulary: Vocabulary) -> None:
    objectives = {"text": NextToken(), "image": Masked()}
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=32, rope_theta=100.0)
    torch.manual_seed(0)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives, next_span_weight=0.5), vocabulary)
    assert model.term_weights == {"text": 1.0, "image": 1.0, "next_span": 0.5}
    documents = [
        [text_part([1], Role.TARGET), image_part([0, 1, 2, 3], Role.TARGET), text_part([2], Role.TARGET)],
        [text_part([3], Role.TARGET), text_part([4], Role.TARGET), image_part([3, 2, 1, 0], Role.TARGET)],
    ]
    sequences = [
        MultimodalSequence.build(parts, vocabulary, objectives, key, learn_order=True)
        for key, parts in enumerate(documents)
    ]
    batch = corrupt(pack([sequences], sum(map(len, sequences)), vocabulary), vocabulary, objectives)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        losses = model(batch)
        optimizer.zero_grad()
        losses["next_span"].backward()
        optimizer.step()
    assert list(losses) == list(model.term_weights)
    assert batch.counts["next_span"] == 6
    assert losses["next_span"].item() < 0.1


def test_objectives_and_modalities_must_agree(vocabulary: Vocabulary) -> None:
    with pytest.raises(ConfigError, match="one objective per modality"):
        UnifiedModel(ModelConfig(objectives={"text": NextToken()}), vocabulary)


def test_later_modalities_move_no_id() -> None:
    before = Vocabulary(TEXT_SIZE, {"image": Discrete(CODEBOOK)})
    after = Vocabulary(TEXT_SIZE, {"image": Discrete(CODEBOOK), "speech": Discrete(16, 2)})
    assert after.size == before.size + 32
    for name in ("text", "image"):
        assert after.begin(name) == before.begin(name)
        assert after.target_range(name) == before.target_range(name)
    assert (after.end, after.pad, after.mask) == (before.end, before.pad, before.mask)


def test_patterns_move_with_their_batch(model: UnifiedModel) -> None:
    sequence = MultimodalSequence.build([text_part([1], Role.TARGET)], model.vocabulary, model.config.objectives)
    batch = corrupt(pack([[sequence]], 4, model.vocabulary), model.vocabulary, model.config.objectives).to("meta")
    assert isinstance(batch.pattern, AttentionPattern)
    tensors = [batch.token_ids, batch.pattern.private, batch.predictions["text"].rows]
    assert all(t.device.type == "meta" for t in tensors)


def test_masked_rows_see_both_ways_and_text_only_back(model: UnifiedModel) -> None:
    parts = [image_part([0, 1, 2, 3], Role.CONTEXT), text_part([1, 2], Role.TARGET)]
    sequence = MultimodalSequence.build(parts, model.vocabulary, {"text": NextToken(), "image": Masked()})
    allowed = pack([[sequence]], len(sequence), model.vocabulary).pattern.allowed()[0]
    assert allowed[1:5, 1:5].all()
    assert not allowed[:5, 5:].any()
    assert torch.equal(allowed[5:, 5:], torch.ones(4, 4, dtype=torch.bool).tril())
