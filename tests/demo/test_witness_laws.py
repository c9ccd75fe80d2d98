"""Witnesses without their weights: their networks, losses and scores against slow and obvious oracles."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eke.demo import crepe, faces, g2p, minilm
from eke.demo.scoring import counted, shuffled


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def speaker():
    torch.manual_seed(0)
    return g2p.Pronouncer(width=16).double().eval()


KNOWN = {"cat": ("K", "AE1", "T"), "do": ("D", "UW1"), "areas": ("EH1", "R", "IY0", "AH0", "Z")}


# Scoring


def test_counts_have_an_outcome_a_sample_and_know_their_order():
    first, second = torch.tensor([True, False]), torch.tensor([True])
    counts = counted([first, second], [torch.tensor([1, 2]), torch.tensor([3])], name="hits")
    assert (counts.correct, counts.total, counts.name) == (2, 3, "hits")
    assert counts.outcomes.tolist() == [True, False, True]
    swapped = counted([second, first], [torch.tensor([3]), torch.tensor([1, 2])], name="hits")
    assert counts.order != swapped.order


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="The evaluation got 0 batches"):
        counted([], [], name="hits")


def test_shuffling_is_the_same_for_any_order_of_arrival():
    texts = [str(i) for i in range(50)]
    assert shuffled(texts) == shuffled(reversed(texts)) != texts
    assert sorted(shuffled(texts)) == sorted(texts)


# g2p


def test_there_is_one_entry_for_each_published_letter_and_phoneme():
    assert (len(g2p.LETTERS), len(g2p.PHONEMES)) == (29, 74)
    assert list(g2p.PHONEMES[4:]) == sorted(g2p.PHONEMES[4:])
    assert g2p.PHONEMES.index("UW") + 1 == g2p.PHONEMES.index("UW0")


def test_padding_does_not_change_what_a_word_becomes(speaker):
    letters, previous, _ = g2p.encoded(KNOWN, KNOWN)
    together = speaker(letters, previous)
    for row, word in enumerate(KNOWN):
        alone = speaker(letters[row : row + 1, : len(word) + 1], previous[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


def test_a_greedy_word_is_what_teacher_forcing_with_itself_answers(speaker):
    letters, _, _ = g2p.encoded(KNOWN, KNOWN)
    # Random networks hardly stop by themselves: the end is made likely enough to happen.
    with torch.no_grad():
        speaker.head.bias[g2p.END] += 0.15
    said = speaker.pronounce(letters)
    start = torch.full_like(said[:, :1], g2p.START)
    again = speaker(letters, torch.cat([start, said[:, :-1]], 1)).argmax(-1)
    open_until = (said == g2p.END).int().cumsum(1) - (said == g2p.END).int() == 0
    assert torch.equal(said[open_until], again[open_until])
    assert bool((said[~open_until] == g2p.PAD).all())


def test_the_loss_is_the_mean_over_spoken_phonemes(speaker):
    letters, previous, phonemes = g2p.encoded(KNOWN, KNOWN)
    logs = speaker(letters, previous).log_softmax(-1)
    spoken = [
        -float(logs[row, step, g2p.PHONEMES.index(sound)])
        for row, sounds in enumerate(KNOWN.values())
        for step, sound in enumerate([*sounds, "</s>"])
    ]
    assert float(g2p.next_phoneme(speaker, ((letters, previous), phonemes))) == pytest.approx(
        sum(spoken) / len(spoken), abs=1e-12
    )


def test_a_word_is_right_if_all_of_it_is():
    letters, previous, phonemes = g2p.encoded(KNOWN, KNOWN)

    class Says(nn.Module):
        def pronounce(self, letters, *, steps):
            said = phonemes.clone()
            said[1, 0] += 1
            return said

    counts = g2p.word_accuracy(Says(), [((letters, previous), phonemes)])
    assert counts.outcomes.tolist() == [True, False, True]


# crepe


def test_a_tone_repeats_after_its_period():
    sounds, cents = crepe.tones(64, seed=3)
    assert sounds.shape == (64, 1024)
    torch.testing.assert_close(sounds.mean(1), torch.zeros(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(sounds.std(1), torch.ones(64), rtol=0, atol=1e-5)
    close = 0
    for sound, cent in zip(sounds, cents):
        period = crepe.RATE / (10 * 2 ** (float(cent) / 1200))
        # The nearest whole number of samples after a few periods.
        times = min(range(1, 4), key=lambda k: abs(k * period - round(k * period)))
        shift = round(times * period)
        if shift < 900:
            close += float(torch.corrcoef(torch.stack([sound[:-shift], sound[shift:]]))[0, 1]) > 0.3
    # At 0 dB of noise the correlation is one half, and a period between two samples lowers it.
    assert close > 0.8 * 64


def test_tones_of_a_seed_are_always_the_same_and_of_another_seed_others():
    first, again, other = (crepe.tones(4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("cents", [2800.0, 4321.0, 7000.0])
def test_the_pitch_of_a_bump_is_where_the_bump_is(cents):
    centres = crepe.FIRST_BIN + crepe.CENTS_A_BIN * torch.arange(360, dtype=torch.float64)
    bump = torch.exp(-0.5 * ((centres - cents) / 25) ** 2).clamp(1e-9, 1 - 1e-9)
    # Nine bins of 20 cents hold all but the tails of a bump of 25 cents.
    assert float(crepe.pitch_of(torch.logit(bump)[None])) == pytest.approx(cents, abs=1.0)


def test_the_pitch_loss_is_the_cross_entropy_of_every_bin():
    logits = torch.randn(2, 360, dtype=torch.float64)
    cents = torch.tensor([3000, 5000])
    total = 0.0
    for row in range(2):
        for index in range(360):
            truth = math.exp(-((crepe.FIRST_BIN + 20 * index - int(cents[row])) ** 2) / (2 * 25**2))
            chance = 1 / (1 + math.exp(-float(logits[row, index])))
            total -= truth * math.log(chance) + (1 - truth) * math.log(1 - chance)
    found = crepe.bump_cross_entropy(lambda sounds: logits, (torch.zeros(2, 1024), cents))
    assert float(found) == pytest.approx(total / 720, rel=1e-12)


def test_a_pitch_is_right_within_half_a_semitone():
    sounds, cents = torch.zeros(3, 1024), torch.tensor([4000, 4000, 4000])

    def heard(sounds):
        centres = crepe.FIRST_BIN + crepe.CENTS_A_BIN * torch.arange(360, dtype=torch.float64)
        there = torch.tensor([4000.0, 4045.0, 4055.0])[:, None]
        return torch.logit(torch.exp(-0.5 * ((centres - there) / 25) ** 2).clamp(1e-9, 1 - 1e-9))

    assert crepe.pitch_accuracy(heard, [(sounds, cents)]).outcomes.tolist() == [True, True, False]


def test_the_pitch_network_takes_windows_and_gives_bins():
    network = crepe.Crepe().eval()
    assert network(torch.randn(2, 1024)).shape == (2, 360)
    assert sum(p.numel() for p in network.parameters()) == 486_552


# faces


@pytest.mark.parametrize(
    ("name", "pixels", "parameters", "answers"),
    [("pnet", 12, 6632, 4), ("rnet", 24, 100178, 4), ("onet", 48, 389040, 14)],
)
def test_face_networks_answer_one_window(name, pixels, parameters, answers):
    network = faces._NETWORKS[name]().eval()
    assert sum(p.numel() for p in network.parameters()) == parameters
    images = faces.sized(torch.rand(3, 1, 25, 25), pixels)
    assert images.shape == (3, 3, pixels, pixels)
    assert float(images.abs().max()) <= 1
    outputs = network(images)
    assert outputs["face"].flatten(1).shape == (3, 2)
    assert faces._answers(outputs).shape == (3, answers)


def test_the_proposal_network_slides_over_larger_images():
    network = faces.PNet().double().eval()
    image = torch.randn(1, 3, 20, 16, dtype=torch.float64)
    whole = network(image)["face"]
    window = network(image[..., 4:16, 2:14])["face"]
    # Answers are two pixels apart.
    torch.testing.assert_close(whole[..., 2, 1], window[..., 0, 0], rtol=0, atol=1e-12)


def test_no_patch_is_in_two_splits():
    splits = {name: set(faces.members(name)) for name in faces.SIZES}
    assert {name: len(chosen) for name, chosen in splits.items()} == faces.SIZES
    assert set().union(*splits.values()) == set(range(100))


def test_calibration_sees_every_patch_in_thirty_ways():
    views = faces._views(torch.rand(2, 1, 25, 25), 24)
    assert len(views) == 30
    assert len({view.numpy().tobytes() for view in views}) == 30


def test_the_loss_holds_offsets_of_faces_alone_to_the_answers():
    images, classes = torch.zeros(2, 3, 12, 12), torch.tensor([1, 0])
    logits, said = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.rand(2, 4)
    answers = said + torch.tensor([[0.1], [5.0]])
    loss = faces.detection_loss(lambda images: {"face": logits, "offsets": said}, (images, (classes, answers)))
    cross = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert float(loss) == pytest.approx(cross + 0.5 * 4 * (0.1 / faces.SPREAD) ** 2 / 2, rel=1e-5)
    counts = faces.face_accuracy(lambda images: {"face": logits}, [(images, (classes, answers))])
    assert counts.outcomes.tolist() == [True, True]


# minilm


def test_paragraphs_are_prose_each_once():
    found = minilm.paragraphs()
    assert len(found) > 400
    every = [sentence for sentences in found for sentence in set(sentences)]
    assert len(set(every)) == len(every)
    assert all(len(sentences) > 1 for sentences in found)


def test_every_sentence_is_a_query_once():
    chosen = [
        ("This is the first one here.", "The second one is here."),
        ("Another text that has words.", "Short.", "A"),
    ]
    every = minilm.pairs(chosen, every=True)
    assert every == [
        (0, "This is the first one here.", "The second one is here."),
        (1, "Another text that has words.", "Short. A"),
        (0, "The second one is here.", "This is the first one here."),
    ]
    assert minilm.pairs(chosen, every=False) == every[:2]


@pytest.fixture
def embedded():
    """A batch of three pairs, and a model that gives each row a fixed vector."""
    torch.manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    batch = {
        "input_ids": torch.arange(6),
        "attention_mask": torch.ones(6),
        "labels": torch.tensor([[4, 0], [4, 1], [7, 0], [7, 1], [9, 0], [9, 1]]),
    }
    return (lambda input_ids, attention_mask: {"embedding": vectors[input_ids]}), batch, vectors


def test_the_contrastive_loss_is_a_softmax_over_the_passages_of_the_batch(embedded):
    model, batch, vectors = embedded
    total = 0.0
    for query in range(3):
        scores = [math.exp(float(vectors[2 * query] @ vectors[2 * passage + 1]) / 0.05) for passage in range(3)]
        total -= math.log(scores[query] / sum(scores))
    assert float(minilm.contrastive(model, batch)) == pytest.approx(total / 3, rel=1e-9)


def test_a_query_without_its_passage_is_refused(embedded):
    model, batch, _ = embedded
    with pytest.raises(ValueError, match="1 queries of the batch have no passage: keep pairs together"):
        minilm.contrastive(model, {name: column[:5] for name, column in batch.items()})


def test_ranks_and_hits_are_counted_over_all_batches(embedded):
    model, batch, vectors = embedded
    pieces = [{name: column[part] for name, column in batch.items()} for part in (slice(0, 2), slice(2, 6))]
    expected = []
    for query in range(3):
        scores = [float(vectors[2 * query] @ vectors[2 * passage + 1]) for passage in range(3)]
        expected.append(sorted(scores, reverse=True).index(scores[query]) + 1)
    places, numbers = minilm.ranks(model, pieces)
    assert (places.tolist(), numbers.tolist()) == (expected, [4, 7, 9])
    assert minilm.first_hits(model, pieces).outcomes.tolist() == [place == 1 for place in expected]
    assert minilm.mean_reciprocal_rank(model, pieces) == pytest.approx(sum(1 / p for p in expected) / 3)


def test_vectors_that_are_all_the_same_find_nothing(embedded):
    _, batch, vectors = embedded
    same = vectors[:1].expand(6, -1)
    counts = minilm.first_hits(lambda input_ids, attention_mask: {"embedding": same[input_ids]}, [batch])
    assert counts.correct == 0


def test_masked_tokens_do_not_count():
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)

    class Encoder(nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=hidden)

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = minilm.Embedder(Encoder())(torch.zeros(2, 5), mask)["embedding"]
    mean = hidden[0, :3].mean(0)
    torch.testing.assert_close(found[0], mean / mean.norm(), rtol=0, atol=1e-12)
