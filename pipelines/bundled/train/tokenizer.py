"""The model's own tokenizer: each word of its small world is one piece, all others are spelled out."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.scenes.captions import Wording
from pipelines.bundled.scenes.nouns import NOUNS
from pipelines.bundled.scenes.scene import sample_scene

SPECIAL = ("<pad>", "</s>", "<unk>")

CORPUS = 3_000
"""Number of captions whose words it knows, besides all names of all nouns."""

SPELLED = -30.0
"""Log probability of a letter: below that of the rarest word, so that no word that has a piece is spelled out."""


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A unigram model (Kudo 2018) over captions of all nouns, including those that a recipe leaves out, so that using
    more of them does not change it. Case and compatibility forms are folded.

    Its pieces are counted rather than estimated: trainers of such models only consider pieces that several words share,
    and would spell out half of these words. `<pad>` is 0 and `</s>`, which ends every text, is 1.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    random = Random(seed)
    wording = Wording(made_up_words=0.0)
    counts: Counter[str] = Counter()
    texts = [text for noun in NOUNS for text in (*noun.names, noun.plural)]
    texts += [wording.caption(sample_scene(random, NOUNS, clip=True), random) for _ in range(CORPUS)]
    for text in texts:
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    total = counts.total()
    pieces = {word: math.log(count / total) for word, count in sorted(counts.items())}
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    for letter in ("▁", *letters):
        pieces.setdefault(letter, SPELLED)
    vocabulary = [*((token, 0.0) for token in SPECIAL), *pieces.items()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
