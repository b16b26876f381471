import copy
import sys

import pytest
import torch

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ItemIndex, item_index


NUM_ITEMS = 500


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ElasticConfig(vocab_size=NUM_ITEMS + 3, hidden_size=16, num_memory_subkeys=5, num_memory_heads=2)
    model = ElasticForSequentialRecommendation(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    return model


@pytest.fixture(scope="module")
def histories():
    histories = torch.randint(3, NUM_ITEMS + 3, (6, 9), generator=torch.Generator().manual_seed(1))
    histories[0, :4] = 0
    return histories


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_all_clusters_visited_is_exact(model, histories, exclude_seen):
    index = ItemIndex(model, num_clusters=7, num_probes=7)
    expected = model.recommend(histories, top_k=11, exclude_seen=exclude_seen)
    found = model.recommend(histories, top_k=11, exclude_seen=exclude_seen, index=index)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.scores, expected.scores)


def test_few_clusters_find_most_of_the_best(model, histories):
    index = ItemIndex(model)  # 89 clusters, 16 of them visited
    expected = model.recommend(histories, top_k=10)
    found = model.recommend(histories, top_k=10, index=index)
    recall = (found.token_ids[..., None] == expected.token_ids[:, None]).any(dim=-1).float().mean()
    assert 0.5 < recall < 1
    assert not (found.token_ids[..., None] == histories[:, None]).any()
    scores = (model.get_user_embeddings(histories) @ model.lm_head.weight.T).gather(1, found.token_ids)
    torch.testing.assert_close(found.scores, scores)
    assert (found.scores.diff() <= 0).all()


def test_what_cannot_be_searched_is_refused(model, histories):
    with pytest.raises(ValueError, match="num_probes <= num_clusters <= 500 .the items., found 8 and 7"):
        ItemIndex(model, num_clusters=7, num_probes=8)
    index = ItemIndex(model, num_clusters=7, num_probes=1)
    with pytest.raises(ValueError, match="candidate_ids must not be given with an index"):
        model.recommend(histories, index=index, candidate_ids=torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"top_k must be at most the number of candidate items \(500\), found 501"):
        model.recommend(histories, index=index, top_k=501)
    with pytest.raises(ValueError, match=r"top_k must be at most the number of items \(500\), found 501"):
        index.search(torch.zeros(2, 16), 501)
    with pytest.raises(ValueError, match="items left to recommend"):
        model.recommend(histories, index=index, top_k=400)  # one cluster holds fewer


def test_an_index_of_other_items_is_refused(model, histories):
    index = ItemIndex(model, num_clusters=7, num_probes=7)
    expected = model.recommend(histories, index=index)
    same = copy.deepcopy(model)
    assert torch.equal(same.recommend(histories, index=index).token_ids, expected.token_ids)
    optimizer = torch.optim.SGD(same.parameters(), lr=0.1)
    same(histories, labels=histories).loss.backward()
    optimizer.step()
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(NUM_ITEMS + 4)
    assigned = copy.deepcopy(model)
    assigned.lm_head.weight.data = torch.randn_like(model.lm_head.weight)
    for other in (same, larger, assigned):
        with pytest.raises(ValueError, match="index must hold the item embeddings of this model, .* build it again"):
            other.recommend(histories, index=index)
    assert torch.equal(model.recommend(histories, index=index).token_ids, expected.token_ids)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_an_index_is_refused_after_training_on(model, histories, options):
    model = copy.deepcopy(model)
    index = ItemIndex(model, num_clusters=7, num_probes=7)
    model.recommend(histories, index=index)
    model(histories, labels=histories).loss.backward()
    torch.optim.AdamW(model.parameters(), **options).step()
    with pytest.raises(ValueError, match="found those of another model, or of this one before they changed"):
        model.recommend(histories, index=index)


def test_the_same_embeddings_are_read_once(model, histories, monkeypatch):
    index = ItemIndex(model, num_clusters=7, num_probes=7)
    monkeypatch.setattr(item_index, "_digest", lambda weight: pytest.fail("read the embeddings again"))
    model.recommend(histories, index=index)


def test_long_lists_of_seen_items_take_memory_linear_in_their_length(model, histories):
    index = ItemIndex(model, num_clusters=7, num_probes=7)
    seen_ids = torch.randint(3, 3 + NUM_ITEMS // 2, (6, 20_000))
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
        found = model.recommend(histories, seen_ids=seen_ids, index=index)
    assert largest <= 2 * seen_ids.numel()
    assert torch.equal(found.token_ids, model.recommend(histories, seen_ids=seen_ids).token_ids)


def test_a_missing_faiss_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        ItemIndex(model)
