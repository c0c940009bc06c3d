"""Tokenizers: byte-pair encoding, and what else there is."""

import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import Tokenizer, learn_merges

from .book import SPEECH, table, to_ids

WORDS = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}  # and how often they occur


@pytest.fixture(scope="module")
def of_the_speech():
    return Tokenizer.train([SPEECH], vocab_size=456)


def test_bpe_merges_the_most_frequent_pair_of_neighbours():
    """How does byte-pair encoding build its vocabulary?

    It starts from the 256 bytes, counts pairs of neighbours, makes the most frequent pair a new token, and
    begins again. The parts stay in the vocabulary, whose size is 256 + merges. The text is first cut into
    words, and no pair crosses a cut.

    Often told: single letters are counted, and merged ones are dropped.
    Code: tokenizer.py learn_merges
    Source: Gage (1994); Sennrich et al. (2016, arXiv 1508.07909), algorithm 1
    """
    chunk, rows = [b"a", b"a", b"a", b"b", b"d", b"a", b"a", b"a", b"b", b"a", b"c"], []
    merges = learn_merges({"aaabdaaabac": 1}, 3)
    for left, right in merges:
        count = Counter(zip(chunk, chunk[1:]))[left, right]
        i = 0
        while i < len(chunk) - 1:
            if (chunk[i], chunk[i + 1]) == (left, right):
                chunk[i : i + 2] = [left + right]
            i += 1
        rows.append((f"{left.decode()} {right.decode()}", count, b" ".join(chunk).decode()))
    table("pair | counted | the text after it", *rows)
    assert chunk == [b"aaab", b"d", b"aaab", b"a", b"c"]
    assert len(Tokenizer.train([SPEECH], 256 + 50, special_tokens=()).tokens) == 256 + 50


def test_a_byte_level_vocabulary_has_no_unknown_token(of_the_speech):
    """What becomes of words that were never seen in training?

    They fall into smaller pieces, in the worst case into single bytes, so that any text comes back as it was.
    WordPiece knows characters, and has an [UNK] for words of which it can't read the rest.

    Often told: BPE keeps an unseen word whole.
    Code: tokenizer.py Tokenizer.encode
    Source: Radford et al. (2019), sec. 2.2; BertTokenizer in transformers
    """

    def word_piece(word, vocabulary):
        """The longest piece that fits, again and again; [UNK] where none does."""
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = [end for end in range(len(word), start, -1) if mark + word[start:end] in vocabulary]
            if not ends:
                return ["[UNK]"]
            pieces.append(mark + word[start : ends[0]])
            start = ends[0]
        return pieces

    characters = set(SPEECH) | {"##" + character for character in SPEECH}
    rows = []
    for text in ("dedicated", "unhallowedness", "naïve", "量子", "🙂👩‍👧", "a\0\n\t b"):
        ids = of_the_speech.encode(text)
        rows.append((repr(text), len(text.encode()), len(ids), word_piece(text, characters) != ["[UNK]"]))
        assert of_the_speech.decode(ids) == text
    table("text | bytes | tokens of BPE | known to WordPiece", *rows)
    assert [row[3] for row in rows] == [True, True, False, False, False, False]
    assert word_piece("hugs", {"hug", "h", "##s"}) == ["hug", "##s"]


def test_wordpiece_takes_the_pair_that_belongs_together_and_not_the_most_frequent():
    """How do WordPiece and BPE differ?

    In which pair they merge. BPE takes the largest count(ab), WordPiece the pair that occurs together more
    often than its parts would by chance, by count(ab) / (count(a) count(b)), which stands for the gain in
    likelihood. Its mark of continuations, ##, is only a way of writing.

    Often told: WordPiece splits from the top, BPE builds from the bottom. Both build (though a later trainer
    of TensorFlow Text does go from the top).
    Code: tokenizer.py learn_merges
    Source: Schuster & Nakajima (2012). Its trainer was not published; the formula is that of Hugging Face's
    course. (The trainer of their library merges by count, as BPE does.)
    """
    pairs, letters = Counter(), Counter()
    for word, count in WORDS.items():
        for letter in word:
            letters[letter] += count
        for pair in zip(word, word[1:]):
            pairs[pair] += count

    def score(pair):
        return pairs[pair] / (letters[pair[0]] * letters[pair[1]])

    rows = [("".join(pair), pairs[pair], score(pair)) for pair in sorted(pairs, key=pairs.get, reverse=True)]
    table("pair | count: BPE takes the most | count(ab) / (count(a) count(b)): WordPiece", *rows)
    assert learn_merges(WORDS, 1) == [(b"u", b"g")] == [tuple(c.encode() for c in rows[0][0])]
    assert max(pairs, key=score) == ("g", "s") and pairs["g", "s"] == 5


def test_sentencepiece_loses_nothing_because_a_space_is_a_symbol(of_the_speech):
    """What is SentencePiece?

    A library that learns BPE or Unigram vocabularies from raw text, with the space as a symbol like any
    other, so that no language needs a splitter of words of its own, and decoding is joining. Byte-level BPE
    loses nothing either. (By default SentencePiece first normalises: two spaces become one, a line break a
    space. That can be turned off.)

    Often told: SentencePiece is a kind of BPE.
    Code: tokenizer.py Tokenizer.decode
    Source: Kudo & Richardson (2018, arXiv 1808.06226), sec. 3.1
    """
    text = "to  be,\nor not to  be"
    with_symbol = text.replace(" ", "▁")
    joined = b"".join(learn_merges({with_symbol: 2}, 4)[-1]).decode()  # of four merges
    pieces = with_symbol.replace(joined, f"|{joined}|").split("|")
    ways = {
        "words": text.split(),
        "pieces, the space a symbol": [piece for piece in pieces if piece],
        "byte-level BPE": [of_the_speech.decode([i]) for i in of_the_speech.encode(text)],
    }
    rows = []
    for way, parts in ways.items():
        back = (" " if way == "words" else "").join(parts).replace("▁", " ")
        rows.append((way, repr("|".join(parts)), back == text))
    table("way | parts | joined, they are the text", *rows)
    assert [row[2] for row in rows] == [False, True, True]
    assert "▁" in joined, "a piece may span what other tokenizers take for a border"


def test_unigram_drops_the_pieces_that_the_text_misses_least():
    """How does a Unigram vocabulary come about?

    From the top: it starts with too many pieces, each with a probability, reads each word by its likeliest
    split, and drops the pieces without which the text becomes least unlikely. BPE adds, Unigram takes away.

    Often told: Unigram counts single characters.
    Code: tokenizer.py learn_merges
    Source: Kudo (2018, arXiv 1804.10959), sec. 3.2
    """
    counts = Counter()
    for word, count in WORDS.items():
        for i in range(len(word)):
            for j in range(i + 1, len(word) + 1):
                counts[word[i:j]] += count
    counts = {piece: n for piece, n in counts.items() if n > 4 or len(piece) == 1}

    def nats(word, pieces):
        """-log p of the likeliest split (Viterbi)."""
        total, best = sum(pieces.values()), [0.0]
        for end in range(1, len(word) + 1):
            starts = (start for start in range(end) if word[start:end] in pieces)
            best.append(min(best[start] - math.log(pieces[word[start:end]] / total) for start in starts))
        return best[-1]

    def loss(pieces):
        return sum(count * nats(word, pieces) for word, count in WORDS.items())

    whole, rows = loss(counts), []
    for piece in (piece for piece in counts if len(piece) > 1):  # single characters must stay
        rest = {other: n for other, n in counts.items() if other != piece}
        rows.append((piece, counts[piece], loss(rest) - whole))
    rows.sort(key=lambda row: row[2])
    table("without the piece | counted | the text costs more nats by", *rows[:3], *rows[-3:])
    assert rows[0][2] < 0 < rows[-1][2], "pieces that are never chosen only take probability from others"
    assert rows[-1][0] in ("hug", "pun")


def test_new_rows_of_a_vocabulary_should_start_at_the_mean(reader_of_the_speech):
    """How is a vocabulary extended, and does it have to be?

    By new rows of the embedding and the head, which change all probabilities through the softmax. A new row
    near zero scores near zero, which is much beside trained scores, most of them negative. The mean of the
    old rows has at most their average exp(score), so that it takes little. Bytes can spell any text without
    new rows; they save tokens, or stand for marks that no text can contain, such as those between the turns
    of a chat.

    Often told: resize the embedding, and that is all.
    Code: finetune.py add_rows
    Source: Hewitt (2021), "Initializing new word embeddings for pretrained language models"
    """
    model = reader_of_the_speech
    with torch.no_grad():
        x = model.hidden(to_ids(SPEECH[:1440]).view(-1, 32)).flatten(0, 1)
    rows = model.model.embed_tokens.weight.detach()  # which are the head's, too
    V, n_new = len(rows), 16
    old, found = (x @ rows.T).log_softmax(-1), []
    ways = {
        "small and random": 0.02 * torch.randn(n_new, 64),
        "the mean of the old": rows.mean(0).expand(n_new, 64),
    }
    for name, new in ways.items():
        now = (x @ torch.cat((rows, new)).T).log_softmax(-1)
        divergence = (old.exp() * (old - now[:, :V])).sum(-1).mean().item()
        found.append((name, now[:, V:].exp().sum(-1).mean(), divergence))
    table(
        f"{n_new} new rows beside {V} | probability that they take | KL divergence: change of the old", *found
    )
    bound = math.log((V + n_new) / V)
    print(
        f"    with the mean the divergence is at most ln({V + n_new}/{V}) = {bound:.3f} (Jensen's inequality)"
    )
    assert found[1][2] < bound and found[1][2] < 0.7 * found[0][2]


def test_word2vec_puts_words_with_the_same_neighbours_together():
    """What are CBOW and skip-gram?

    CBOW predicts a word from the mean of its neighbours, skip-gram each neighbour from the word; both have an
    input and an output matrix, of which the first is kept. Words with the same neighbours come together, even
    if they never meet. Today's embeddings are learned with the rest of the model.

    Often told: where the guess is right, nothing is learned. The loss is graded: there is always a gradient.
    Code: model.py Transformer.hidden
    Source: Mikolov et al. (2013, arXiv 1301.3781)
    """
    rng, animals, foods = random.Random(0), ["cat", "dog", "cow"], ["pie", "jam", "nut"]
    text = []
    for _ in range(300):
        text += rng.choice((["the", rng.choice(animals), "runs"], ["eat", rng.choice(foods), "now"]))
    vocabulary = sorted(set(text))
    ids = torch.tensor([vocabulary.index(word) for word in text])
    words, neighbours = torch.cat((ids[1:], ids[:-1])), torch.cat((ids[:-1], ids[1:]))
    inputs, outputs = (nn.Parameter(0.3 * torch.randn(len(vocabulary), 8)) for _ in range(2))
    optimizer = torch.optim.Adam([inputs, outputs], lr=0.05)
    for _ in range(100):
        loss = F.cross_entropy(inputs[words] @ outputs.T, neighbours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def cosine(a, b):
        return F.cosine_similarity(inputs[vocabulary.index(a)], inputs[vocabulary.index(b)], 0).item()

    rows = [(a, b, cosine(a, b)) for a, b in (("cat", "dog"), ("pie", "jam"), ("cat", "pie"))]
    table("word | word | cosine", *rows)
    assert min(rows[0][2], rows[1][2]) > 0.8 and rows[2][2] < 0.5
