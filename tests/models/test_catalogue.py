import math
import threading

import pytest
import torch
from torch import nn

import reference
from adapters import LowRankAdapter
from elastic_hf.models import catalogue
from elastic_hf.models.catalogue import (
    CatalogueQuery,
    first_read,
    item_embeddings,
    row_chunks,
    search_catalogue,
)
from elastic_hf.models.configuration_recommender import RecommenderConfig
from elastic_hf.models.plain_linear import is_plain_linear


NUM_ITEMS, NUM_SPECIAL, D = 31, 3, 5
VOCAB_SIZE = NUM_ITEMS + NUM_SPECIAL


def make_head(items):
    head = nn.Linear(items.shape[1], items.shape[0], bias=False, dtype=items.dtype)
    with torch.no_grad():
        head.weight.copy_(items)
    return head


def make_config(items):
    return RecommenderConfig(vocab_size=len(items), hidden_size=items.shape[1], num_special_tokens=NUM_SPECIAL)


def rank(users, items, targets, seen=None):
    query = CatalogueQuery(seen_ids=seen, target_ids=targets)
    return search_catalogue(make_head(items), users, query, make_config(items)).ranks


def set_chunks(monkeypatch, rows):
    monkeypatch.setattr(catalogue, "MAX_SCORES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(catalogue, "MIN_ROWS", rows)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(-3, 4, (7, D), generator=generator).float()
    items = torch.randint(-3, 4, (VOCAB_SIZE, D), generator=generator).float()  # small integers: many ties
    targets = torch.randint(NUM_SPECIAL, VOCAB_SIZE, (7,), generator=generator)
    seen = torch.randint(0, VOCAB_SIZE, (7, 12), generator=generator)
    seen[:, :3] = 0
    seen[0, 5:7] = 9  # the same item seen twice counts once
    seen[1, -1] = targets[1]
    return users, items, targets, seen


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_ranks_equal_the_loop(batch, rows, monkeypatch):
    set_chunks(monkeypatch, rows)
    ranks = rank(*batch)
    assert ranks.tolist() == reference.rank_targets(*batch, NUM_SPECIAL)
    assert ranks[1, 0] == NUM_ITEMS


def test_rank_worked_by_hand():
    #        PAD  UNK MASK    items 3, 4, 5, 6, 7
    items = torch.tensor([[99.0], [99.0], [99.0], [5.0], [4.0], [3.0], [3.0], [1.0]])
    user = torch.ones(1, 1)
    seen = torch.tensor([[0, 0, 3, 7]])
    # Items 3, 4 are above target 5 and item 6 ties with it: rank 4, or 3 without the seen item 3.
    assert rank(user, items, torch.tensor([5]), seen).tolist() == [[3, 4]]
    # The special tokens' scores of 99 are no competition.
    assert rank(user, items, torch.tensor([4]), seen).tolist() == [[1, 2]]
    # Target 3 has been seen: nothing that excludes seen items can recommend it.
    assert rank(user, items, torch.tensor([3]), seen).tolist() == [[5, 1]]
    assert rank(user, items, torch.tensor([3])).tolist() == [[1, 1]]


@pytest.mark.parametrize("num_users", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_scorer_is_always_last(num_users, rows, dtype, monkeypatch):
    """Equal item embeddings, whose scores a matrix product does not round alike in all columns."""
    set_chunks(monkeypatch, rows)
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(1, 50, generator=generator, dtype=dtype).expand(1003, 50)
    users = torch.randn(num_users, 50, generator=generator, dtype=dtype)
    # Scores near 0, so that the error is large beside them.
    users[0] -= items[0] * (users[0] @ items[0]) / (items[0] @ items[0])
    targets = torch.randint(3, 1003, (num_users,), generator=generator)
    assert rank(users, items, targets).unique().tolist() == [1000]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_count_against_the_model(batch, bad):
    users, items, targets, _ = batch
    assert rank(users * bad, items, targets).unique().tolist() == [NUM_ITEMS]
    items = items.clone()
    items[targets] = math.nan
    assert rank(users, items, targets).unique().tolist() == [NUM_ITEMS]


def test_one_nan_competitor_counts_against_the_model(batch):
    users, items, targets, _ = batch
    items[3:] = 0.0
    items[targets] = users
    items[(set(range(3, VOCAB_SIZE)) - set(targets.tolist())).pop()] = math.nan
    assert rank(users[:1], items, targets[:1])[0, 0] >= 2


def test_ranks_do_not_depend_on_the_batch_or_the_chunk(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(17, 64, generator=generator), torch.randn(503, 64, generator=generator)
    targets = torch.randint(3, 503, (17,), generator=generator)
    seen = torch.randint(3, 503, (17, 20), generator=generator)
    ranks = rank(users, items, targets, seen)
    assert ranks.tolist() == reference.rank_targets(users.double(), items.double(), targets, seen, NUM_SPECIAL)
    set_chunks(monkeypatch, 5)
    assert torch.equal(ranks, rank(users, items, targets, seen))
    alone = [rank(users[i : i + 1], items, targets[i : i + 1], seen[i : i + 1]) for i in range(17)]
    assert torch.equal(ranks, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_ranked_and_recommended_exactly(dtype):
    # 257 and 2049 are no numbers of these types: the two items would tie.
    large = 256.0 if dtype == torch.bfloat16 else 2048.0
    items = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.0], [1.0, 1.0]], dtype=dtype)
    user = torch.tensor([[large, 1.0]], dtype=dtype)
    assert rank(user, items, torch.tensor([4])).tolist() == [[1, 1]]
    assert rank(user, items, torch.tensor([3])).tolist() == [[2, 2]]
    head, config = make_head(items), make_config(items)
    for candidates in (None, torch.tensor([3, 4])):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = search_catalogue(head, user, CatalogueQuery(2, candidate_ids=candidates), config)
        assert answer.token_ids.tolist() == [[4, 3]]
        assert answer.scores.tolist() == [[large + 1, large]] and answer.scores.dtype == torch.float32
    assert head.weight.dtype == dtype


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("has_seen", [True, False])
@pytest.mark.parametrize("has_candidates", [True, False])
@pytest.mark.parametrize("is_adapted", [True, False])
def test_the_best_items_equal_sorting(batch, rows, has_seen, has_candidates, is_adapted, monkeypatch):
    set_chunks(monkeypatch, rows)
    users, items, _, seen = batch
    users = users + torch.linspace(0, 0.1, D)  # no ties
    torch.manual_seed(0)
    head = LowRankAdapter(make_head(items)) if is_adapted else make_head(items)
    candidates = torch.tensor([17, 4, 33, 3, 12, 6, 25]) if has_candidates else None
    query = CatalogueQuery(5, seen if has_seen else None, candidates)
    answer = search_catalogue(head, users, query, make_config(items))
    allowed = range(NUM_SPECIAL, VOCAB_SIZE) if candidates is None else candidates.tolist()
    allowed = [[i for i in allowed if not has_seen or i not in row] for row in seen.tolist()]
    expected = reference.best_items(head(users), allowed, 5)
    assert [[i for i in row if i != -1] for row in answer.token_ids.tolist()] == expected
    assert torch.equal(answer.scores == -math.inf, answer.token_ids == -1)
    found = answer.token_ids != -1
    scores = head(users).gather(1, answer.token_ids.clamp(min=0))
    torch.testing.assert_close(answer.scores[found], scores[found])
    assert answer.ranks is None


def test_ranks_and_the_best_items_come_from_one_pass(batch, monkeypatch):
    set_chunks(monkeypatch, 3)
    users, items, targets, seen = batch
    head, config, scored = make_head(items), make_config(items), []
    head.register_forward_hook(lambda module, args, scores: scored.append(len(scores)))
    answer = search_catalogue(head, users, CatalogueQuery(20, seen, target_ids=targets), config)
    assert torch.equal(answer.ranks, rank(users, items, targets, seen))
    assert scored == [catalogue.NUM_PROBES, 3, 3, 1]
    assert answer.token_ids.shape == (7, 20)
    scored.clear()
    search_catalogue(head, users, CatalogueQuery(2), config)
    assert scored == [3, 3, 1]


def test_the_best_items_are_of_all_where_seen_items_are_kept_and_ranks_are_both(batch):
    users, items, targets, seen = batch
    users = users + torch.linspace(0, 0.1, D)  # no ties
    head, config = make_head(items), make_config(items)
    query = CatalogueQuery(5, seen, target_ids=targets)
    excluded = search_catalogue(head, users, query, config)
    config.exclude_seen = False
    kept = search_catalogue(head, users, query, config)
    everything = [range(NUM_SPECIAL, VOCAB_SIZE)] * len(users)
    assert kept.token_ids.tolist() == reference.best_items(head(users), everything, 5)
    assert not torch.equal(kept.token_ids, excluded.token_ids) and torch.equal(kept.ranks, excluded.ranks)
    told = search_catalogue(head, users, query._replace(exclude_seen=True), config)
    assert torch.equal(told.token_ids, excluded.token_ids)


def test_candidates_of_a_plain_head_are_scored_alone(batch, monkeypatch):
    users, items, _, _ = batch
    head = make_head(items)
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("scored the whole catalogue"))
    search_catalogue(head, users, CatalogueQuery(2, candidate_ids=torch.tensor([5, 7, 9])), make_config(items))


def test_more_than_there_is_ends_in_minus_one(batch):
    users, items, _, _ = batch
    answer = search_catalogue(make_head(items), users, CatalogueQuery(NUM_ITEMS + 4), make_config(items))
    assert answer.token_ids[:, :NUM_ITEMS].sort().values.tolist() == [list(range(3, VOCAB_SIZE))] * 7
    assert (answer.token_ids[:, NUM_ITEMS:] == -1).all() and (answer.scores[:, NUM_ITEMS:] == -math.inf).all()


def test_an_adapter_takes_part_in_ranks(batch):
    users, items, targets, seen = batch
    torch.manual_seed(0)
    head = LowRankAdapter(make_head(items))
    merged = items.double() + head.up.weight.double() @ head.down.weight.double()
    answer = search_catalogue(head, users, CatalogueQuery(3, seen, target_ids=targets), make_config(items))
    assert torch.equal(answer.ranks, rank(users.double(), merged.detach(), targets, seen))
    assert not torch.equal(answer.ranks, rank(users, items, targets, seen))


@pytest.mark.filterwarnings("ignore")  # of what is to become of quantisation in PyTorch
def test_a_quantised_head_is_ranked_by_its_own_scores(batch):
    users, items, targets, seen = batch
    users, items = users + torch.linspace(0, 0.3, D), items + torch.linspace(0, 0.2, D)
    model = nn.Sequential(make_head(items))
    head = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)[0]
    assert not list(head.parameters())
    scores = head(users)
    answer = search_catalogue(head, users, CatalogueQuery(3, target_ids=targets), make_config(items))
    assert answer.token_ids.tolist() == reference.best_items(scores, [range(3, VOCAB_SIZE)] * 7, 3)
    target_scores = scores.gather(1, targets[:, None])
    strictly, nearly = ((scores[:, 3:] >= target_scores - gap).sum(dim=1) for gap in (0, 1e-4))
    assert (strictly <= answer.ranks[:, 1]).all() and (answer.ranks[:, 1] <= nearly).all()
    with pytest.raises(ValueError, match="lm_head must be a plain .* for a test, .*quantized.dynamic"):
        item_embeddings(head, "a test")


def test_an_offloaded_head_is_scored(batch):
    accelerate = pytest.importorskip("accelerate")
    users, items, targets, seen = batch
    head = make_head(items)
    expected = search_catalogue(head, users, CatalogueQuery(3, seen, target_ids=targets), make_config(items))
    accelerate.cpu_offload(head, execution_device="cpu")
    assert head.weight.is_meta and not is_plain_linear(head)
    found = search_catalogue(head, users, CatalogueQuery(3, seen, target_ids=targets), make_config(items))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"lm_head must be a plain .* with a weight Parameter on meta"):
        item_embeddings(head, "a test")


def test_a_search_leaves_other_threads_their_precision(batch):
    """A search in double precision, halted while it scores, and a product in another thread."""
    users, items, targets, _ = batch
    head, config = make_head(items), make_config(items)
    is_scoring, is_done = threading.Event(), threading.Event()

    def halt(module, args, scores):
        assert scores.dtype == torch.float64
        is_scoring.set()
        assert is_done.wait(1_800)

    head.register_forward_hook(halt)
    thread = threading.Thread(target=search_catalogue, args=(head, users, CatalogueQuery(target_ids=targets), config))
    thread.start()
    assert is_scoring.wait(1_800)
    try:
        assert nn.functional.linear(users, head.weight).dtype == torch.float32
    finally:
        is_done.set()
        thread.join()


def test_plain_linear_heads_are_told_from_others():
    head = nn.Linear(3, 4, bias=False)
    assert is_plain_linear(head) and item_embeddings(head, "a test") is head.weight
    hooked = nn.Linear(3, 4, bias=False)
    hooked.register_forward_hook(lambda *_: None)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4, bias=False))
    for other in (nn.Linear(3, 4), LowRankAdapter(head), hooked, parametrized, nn.Linear(3, 4, False, "meta")):
        with pytest.raises(ValueError, match="lm_head must be a plain torch.nn.Linear .* for a test"):
            item_embeddings(other, "a test")


def test_the_first_read_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 9, (4, 13), generator=generator)
    rows = torch.tensor([[2], [0], [3], [0], [1]])
    items = torch.randint(0, 12, (5, 6), generator=generator)
    expected = [
        [row.index(item) if item in row else 13 for item in wanted]
        for row, wanted in zip((token_ids[i].tolist() for i in rows[:, 0]), items.tolist(), strict=True)
    ]
    assert first_read(token_ids, rows, items).tolist() == expected
    assert 13 in sum(expected, []) and 0 in sum(expected, [])
    assert first_read(token_ids[:, :0], rows, items).tolist() == [[0] * 6] * 5
    assert first_read(token_ids, rows[:0], items[:0]).shape == (0, 6)


def test_seen_items_take_memory_linear_in_their_number(batch):
    """No tensor on the way is larger than a few times the seen items."""
    users, items, targets, _ = batch
    seen = torch.randint(0, VOCAB_SIZE, (7, 5000))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return output

    with Watch():
        search_catalogue(make_head(items), users, CatalogueQuery(3, seen, target_ids=targets), make_config(items))
        first_read(seen, torch.arange(7)[:, None], torch.randint(0, VOCAB_SIZE, (7, 4)))
    assert 7 * 5000 <= largest <= 2 * 7 * 5000


def test_chunks_cover_the_rows(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(catalogue, "MAX_SCORES", {"cpu": 100, "cuda": 1})
    monkeypatch.setattr(catalogue, "MIN_ROWS", 2)
    assert list(row_chunks(7, 33, device)) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert list(row_chunks(3, 1000, device)) == [slice(0, 2), slice(2, 4)]
    assert list(row_chunks(3, 1000, device, min_rows=3)) == [slice(0, 3)]
    assert list(row_chunks(0, 5, device)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, found 0"),
        ({"top_k": 2.0}, "top_k must be an integer of at least 1, found 2.0"),
        ({"top_k": True}, "found True"),
        ({"seen_ids": torch.zeros(7, dtype=torch.long)}, r"seen_ids must have shape \(7, num_seen\), found \(7,\)"),
        ({"seen_ids": torch.zeros(6, 2, dtype=torch.long)}, r"\(7, num_seen\), found \(6, 2\)"),
        ({"seen_ids": torch.zeros(7, 2)}, "seen_ids must be a tensor of token ids .*, found torch.float32"),
        ({"seen_ids": torch.full((7, 2), -1)}, "seen_ids must be token ids, from 0 to 33, found -1 to -1"),
        ({"candidate_ids": torch.tensor([5, 5])}, "candidate_ids must .* be distinct, found shape .* 1 distinct"),
        ({"candidate_ids": torch.tensor([[5]])}, "candidate_ids must have shape .* found shape"),
        ({"candidate_ids": torch.tensor([2, 5])}, "candidate_ids must be items, from 3 to 33, found 2 to 5"),
        ({"candidate_ids": [5]}, "candidate_ids must be a tensor of token ids .*, found list"),
        ({"target_ids": torch.full((4,), 3)}, r"target_ids must have shape \(7,\), found \(4,\)"),
        ({"target_ids": torch.full((7,), 2)}, "target_ids must be items, from 3 to 33, found 2 to 2"),
        ({"target_ids": torch.full((7,), VOCAB_SIZE)}, "found 34 to 34"),
        (
            {"target_ids": torch.full((7,), 3), "candidate_ids": torch.tensor([5])},
            "candidate_ids must not be given with target_ids",
        ),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(batch, change, message):
    users, items, _, _ = batch
    with pytest.raises(ValueError, match=message):
        search_catalogue(make_head(items), users, CatalogueQuery(**change), make_config(items))
