from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmark.model import make_model
from benchmark.tokenizer import make_tokenizer, word_ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", size="tiny", context=512)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama)


def test_a_complete_directory_is_reused(llama: Path) -> None:
    before = (llama / "model.safetensors").stat().st_mtime_ns
    assert make_model(llama, size="tiny", context=512) == llama
    assert (llama / "model.safetensors").stat().st_mtime_ns == before


def test_other_arguments_do_not_overwrite(llama: Path) -> None:
    with pytest.raises(FileExistsError, match="take another path"):
        make_model(llama, size="tiny", context=1_024)


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="something else"):
        make_model(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_processes_that_make_the_same_model_at_once_agree(tmp_path: Path) -> None:
    threads = [threading.Thread(target=make_model, args=(tmp_path / "model",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "benchmark-model.json").exists()


@pytest.mark.parametrize("architecture", ["llama", "deepseek-mla", "gemma3"])
def test_greedy_answers_vary_and_depend_on_every_part_of_the_prompt(
    tmp_path: Path, tokenizer: Any, architecture: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = make_model(tmp_path / "model", architecture=architecture)  # type: ignore[arg-type]
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    words = word_ids(tokenizer)
    prompt = torch.tensor([words[:200]])
    changed = prompt.clone()
    changed[0, 3] = words[-1]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    first, second = (model.generate(ids, **options)[0, 200:].tolist() for ids in (prompt, changed))
    assert len(set(first)) > 12
    assert first != second
    assert set(first) <= set(words)
    assert tokenizer.encode(tokenizer.decode(first)) == first


def test_a_draft_model_has_one_layer_and_joins_hidden_state_and_token(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = make_model(tmp_path / "draft", architecture="llama-eagle")
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle"]
    assert config["num_hidden_layers"] == 1
    weights = load_file(path / "model.safetensors")
    assert weights["fc.weight"].shape == (192, 2 * 192)
    assert {name for name in weights if name.startswith("layers.")} >= {"layers.0.self_attn.q_proj.weight"}
    assert "layers.0.input_layernorm.weight" not in weights


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("koru mina", "Grüße, 世界! 🚢\n\ttabs", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_history_is_a_prefix_of_the_next_prompt(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    first = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages += [{"role": "assistant", "content": " koru"}, {"role": "user", "content": "More"}]
    second = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert second.startswith(first + " koru")


@pytest.mark.parametrize("vocabulary", [1_024, 8_192])
def test_vocabulary_has_the_size_asked_for(vocabulary: int) -> None:
    made = make_tokenizer(vocabulary, context=512)
    assert len(made) == vocabulary
    assert sorted(made.get_vocab().values()) == list(range(vocabulary))


def test_config_says_what_was_asked(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert config["dtype"] == "float32"
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["head_dim"] == 64
