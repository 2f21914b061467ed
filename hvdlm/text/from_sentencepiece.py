"""A sentencepiece model as a `tokenizer.json` that gives the same ids, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hvdlm.config import UserError
from hvdlm.text.merges import derive
from hvdlm.text.proof import excerpt, first_difference, probes

if TYPE_CHECKING:
    import sentencepiece

SUFFIX = ".model"
_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""`TrainerSpec.ModelType` and `SentencePiece.Type` of sentencepiece_model.proto."""
_PUBLISHED = "take the tokenizer.json that is published with the model, if there is one"


def build(path: Path) -> tokenizers.Tokenizer:
    """Convert a model, and prove that it encodes as sentencepiece does.

    Args:
        path: a Unigram or BPE model.

    Returns:
        A library tokenizer; the same model gives the same bytes.

    Raises:
        UserError: no sentencepiece, no model, or one whose ids a tokenizer.json does not give.
    """
    spec, processor = _read(path)
    reason = _unsupported(spec)
    if reason:
        raise UserError(f"{path}: cannot be made a tokenizer.json: {reason}; {_PUBLISHED}")
    library = tokenizers.Tokenizer(_model(spec))
    library.normalizer = _normalizer(spec.normalizer_spec)
    splitters = _splitters(spec)
    if splitters:
        library.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    library.decoder = _decoder(spec.normalizer_spec)
    names = [piece.piece for piece in spec.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    _prove(path, processor, library)
    return library


def _read(path: Path) -> tuple[Any, sentencepiece.SentencePieceProcessor]:
    """The model as a protobuf message, and as what encodes with it."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"{path}: a sentencepiece model needs the package {error.name}; "
            "pip install sentencepiece protobuf"
        ) from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this tokenizer: {error.strerror}; give the path of a sentencepiece model"
        ) from None
    spec: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        spec.ParseFromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        if not spec.pieces:
            raise ValueError("it has no pieces")
        return spec, processor
    except Exception as error:  # protobuf's DecodeError, sentencepiece's RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a sentencepiece model ({reason}); give another tokenizer") from None


def _unsupported(spec: Any) -> str:
    """What in a model has no counterpart in a tokenizer.json; "" for nothing."""
    kinds = {piece.type for piece in spec.pieces}
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        return "it is neither of type unigram nor bpe"
    if kinds & {_USER_DEFINED, _UNUSED}:
        return "it has user-defined or unused pieces"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "it treats white space as a suffix, or does not escape it"
    return ""


def _model(spec: Any) -> models.Model:
    trainer = spec.trainer_spec
    unknown = next(id for id, piece in enumerate(spec.pieces) if piece.type == _UNKNOWN)
    if trainer.model_type == _UNIGRAM:
        vocab = [(piece.piece, piece.score) for piece in spec.pieces]
        return models.Unigram(vocab, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    ids = {piece.piece: id for id, piece in enumerate(spec.pieces)}
    normal = [piece for piece in spec.pieces if piece.type == _NORMAL]
    by_score = sorted(normal, key=lambda piece: (-piece.score, ids[piece.piece]))
    return models.BPE(
        ids,
        derive({piece.piece: rank for rank, piece in enumerate(by_score)}),
        unk_token=spec.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence(steps)


def _splitters(spec: Any) -> list[pre_tokenizers.PreTokenizer]:
    """Cuts that no piece crosses: they change no id, but at the names that text must not spell."""
    pieces = [piece.piece for piece in spec.pieces if piece.type == _NORMAL]
    splitters: list[pre_tokenizers.PreTokenizer] = []
    names = [piece.piece for piece in spec.pieces if piece.type in (_CONTROL, _UNKNOWN, _BYTE)]
    inside = {
        f"{re.escape(name[0])}(?={re.escape(name[1:])})"
        for name in names
        if len(name) > 1 and not any(name[:2] in piece for piece in pieces)
    }
    # A Unigram model finds them in text: there they are pieces like any other.
    if inside and spec.trainer_spec.model_type == _UNIGRAM:
        splitters.append(pre_tokenizers.Split(Regex("|".join(sorted(inside))), "merged_with_previous"))
    if not any(_SPACE in piece[1:] for piece in pieces):
        splitters.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=True))
    return splitters


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _prove(
    path: Path, processor: sentencepiece.SentencePieceProcessor, library: tokenizers.Tokenizer
) -> None:
    def wanted(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids) for ids in processor.encode(list(texts))]

    def found(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(result.ids) for result in encoded]

    library.encode_special_tokens = True
    text = first_difference(wanted, found, list(probes()))
    library.encode_special_tokens = False
    if text is not None:
        raise UserError(
            f"{path}: cannot be made a tokenizer.json with the same ids (its normalization or the way it "
            f"breaks ties): they differ for {excerpt(text)}; {_PUBLISHED}"
        )
