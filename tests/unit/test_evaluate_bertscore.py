"""BERTScore with a local encoder: offline, equal to the library, and honest about what it cut."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from components.common.errors import ModelError
from components.evaluate.bertscore import Encoder, check_encoder

LONG = "血压长期控制不好会损害心脏、大脑、肾脏和眼底。" * 20


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Encoder:
    return Encoder.load(tiny_model)


@pytest.fixture(scope="module")
def bert(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a window of 64 tokens, saved with a head that an encoder does not use."""
    folder = tmp_path_factory.mktemp("encoder") / "t5-named-bert"  # bert-score takes any path with "t5" in it for a T5
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scores_of(encoder: Encoder, references: Sequence[str], answers: Sequence[str], **how: Any) -> list[float]:
    """F1 of one model's answers."""
    return encoder.scores_of_models(references, {"tuned": answers}, **how)["tuned"]


def test_models_are_scored_as_if_alone_and_a_shared_text_is_encoded_once(
    encoder: Encoder, tiny_rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    references = [row["answer"] for row in tiny_rows[:4]]
    models = {"tuned": references[1:] + references[:1], "base": [*references[1:], "多喝水"], "empty": [""] * 4}
    alone = {name: scores_of(encoder, references, answers, batch_size=4) for name, answers in models.items()}
    encoded: list[str] = []
    encode = Encoder._encode

    def noted(self: Encoder, windows: dict[str, list[list[int]]]) -> dict[str, Any]:
        encoded.extend(windows)
        return encode(self, windows)

    monkeypatch.setattr(Encoder, "_encode", noted)
    together = encoder.scores_of_models(references, models, batch_size=4)
    assert together == {name: pytest.approx(scores, abs=1e-4) for name, scores in alone.items()}
    assert sorted(encoded) == sorted({*references, "多喝水"})


def test_identical_texts_score_1_and_other_texts_less(encoder: Encoder, tiny_rows: list[dict[str, str]]) -> None:
    answers = [row["answer"] for row in tiny_rows[:4]]
    assert scores_of(encoder, answers, answers, batch_size=3) == pytest.approx([1.0] * 4, abs=1e-5)
    others = scores_of(encoder, answers, answers[1:] + answers[:1], batch_size=3)
    assert all(0 < score < 0.97 for score in others)


def test_two_thirds_of_the_layers_are_used(encoder: Encoder) -> None:
    assert encoder.layers == 3  # of 4
    assert len(encoder.model.layers) == 3


def test_it_equals_the_librarys_own_scorer(encoder: Encoder, tiny_model: Path, tiny_rows: list[dict[str, str]], tmp_path: Path) -> None:
    from bert_score import BERTScorer

    references, answers = [row["answer"] for row in tiny_rows[:6]], [row["answer"] for row in tiny_rows[6:12]]
    scorer = BERTScorer(model_type=str(tiny_model), num_layers=3, lang=None, rescale_with_baseline=False, device="cpu")
    scorer._tokenizer.model_max_length = encoder.window_tokens
    plain = scorer.score(answers, references)[2].tolist()
    # The encoder computes in this machine's usual precision, bf16 perhaps; the library's scorer in that of the folder.
    assert scores_of(encoder, references, answers, batch_size=6) == pytest.approx(plain, abs=0.02)


def test_d12_batches_do_not_change_a_score_or_the_order(bert: Path, tiny_rows: list[dict[str, str]]) -> None:
    encoder = Encoder.load(bert)
    references = [row["answer"][: 5 + 7 * at] for at, row in enumerate(tiny_rows[:7])]
    answers = [row["question"] for row in tiny_rows[:7]]
    done: list[int] = []
    together = scores_of(encoder, references, answers, batch_size=4, on_done=done.append)
    alone = [scores_of(encoder, [reference], [answer], batch_size=1)[0] for reference, answer in zip(references, answers, strict=True)]
    assert together == pytest.approx(alone, abs=0.01)
    assert done == [4, 3]


def test_d12_a_text_beyond_the_window_is_scored_whole_and_counted(bert: Path) -> None:
    encoder = Encoder.load(bert)
    assert (encoder.window_tokens, encoder.layers) == (64, 2)
    scores_of(encoder, ["血压", LONG], ["血压", "血压"], batch_size=2)
    assert encoder.windowed_texts == 1
    same = scores_of(encoder, [LONG], [LONG], batch_size=2)
    assert encoder.windowed_texts == 3 and same == pytest.approx([1.0], abs=1e-5)
    # What only differs far behind the window counts: a cut text would score 1.
    assert scores_of(encoder, [LONG], [LONG[:300] + "头痛发热，请多喝水。" * 10], batch_size=1)[0] < 0.999


def test_windows_of_different_texts_do_not_mix(bert: Path) -> None:
    encoder = Encoder.load(bert)
    pairs = [(LONG, "头痛" * 90), ("头痛" * 90, LONG), ("血压", "头痛")]
    together = scores_of(encoder, [one for one, _ in pairs], [two for _, two in pairs], batch_size=3)
    alone = [scores_of(encoder, [one], [two], batch_size=1)[0] for one, two in pairs]
    assert together == pytest.approx(alone, abs=0.01)
    assert together[0] == pytest.approx(together[1], abs=0.01)  # F1 is symmetric


def test_d12_no_network(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("BERTScore opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert scores_of(Encoder.load(bert), ["血压"], ["血压"], batch_size=1) == pytest.approx([1.0], abs=1e-5)


def test_an_empty_answer_scores_0(encoder: Encoder) -> None:
    assert scores_of(encoder, ["多喝水", "多休息"], ["", " \n"], batch_size=2) == [0.0, 0.0]
    assert scores_of(encoder, ["多喝水", "多休息"], ["", "多休息"], batch_size=2) == pytest.approx([0.0, 1.0], abs=1e-5)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ModelError, match="not there") as missing:
        check_encoder(tmp_path / "absent")
    assert "--bertscore_model" in missing.value.fix
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(ModelError, match="can't be loaded"):
        Encoder.load(tmp_path)


def test_an_encoder_with_missing_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    """The library would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    for path in bert.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(bert / "model.safetensors")
    weights.pop("bert.encoder.layer.0.attention.self.query.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="weights are missing"):
        Encoder.load(tmp_path)
