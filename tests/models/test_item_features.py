import copy
import math

import pyarrow as pa
import pytest
import torch

import reference
from elastic_hf import ElasticForSequentialRecommendation, ElasticItemTokenizer, ItemIndex
from elastic_hf.baselines import SASRecConfig
from elastic_hf.models import item_features
from elastic_hf.models.borrowed_ids import borrow_ids
from factories import ITEM_FEATURES, NUM_TOKENS, elastic_config, elastic_model, featured_model, histories, item_table


LOSSES = ("full_softmax", "sampled_softmax", "gbce", "bce")


@pytest.fixture(scope="module")
def featured():
    return featured_model()


@pytest.mark.parametrize("in_training", [True, False])
def test_item_vectors_are_those_of_the_loop(in_training):
    model, _ = featured_model(item_id_dropout=0.0)
    model = model.double().train(in_training)
    features, embed = model.model.item_features, model.get_input_embeddings()
    expected = torch.stack([reference.item_vector(features, embed.weight, item) for item in range(NUM_TOKENS)])
    token_ids = torch.tensor([[5, 3, 30], [0, 5, 12]])
    found = features.vectors(embed, token_ids)
    torch.testing.assert_close(found, expected[token_ids])
    torch.testing.assert_close(features.head(embed).weight, expected)
    with torch.no_grad():
        torch.testing.assert_close(features.head(embed).weight, expected)
    weights = [*features.parameters(), embed.weight]
    direction = torch.randn_like(found)
    wanted = torch.autograd.grad((expected[token_ids] * direction).sum(), weights)
    for gradient, of_loop in zip(torch.autograd.grad((found * direction).sum(), weights), wanted, strict=True):
        keep = torch.ones_like(gradient)
        if len(gradient) > 1 and gradient.shape[1] == model.config.hidden_size:
            keep[0] = 0  # padding has no gradient
        torch.testing.assert_close(gradient, of_loop * keep)


def test_vectors_are_in_the_input_and_in_the_scores(featured):
    model, _ = featured
    plain = model.without_item_features()
    input_ids, mask = histories()
    assert plain.config.item_features is None and plain.num_parameters() < model.num_parameters()
    expected = plain(input_ids, mask)
    torch.testing.assert_close(model(input_ids, mask).logits, expected.logits)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids, mask).logits, expected.logits)
    recommended, wanted = (of.recommend(input_ids, mask, top_k=5) for of in (model, plain))
    assert torch.equal(recommended.token_ids, wanted.token_ids)
    explained, wanted = (of.explain(input_ids[1:], top_k=2) for of in (model, plain))
    torch.testing.assert_close(explained.contributions, wanted.contributions)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_losses_are_those_of_the_item_vectors(loss, exclude_seen):
    changes = dict(training_loss=loss, exclude_seen=exclude_seen, hidden_dropout=0.0, item_id_dropout=0.0)
    model, _ = featured_model(**changes)
    plain = model.without_item_features()
    input_ids, mask = histories()
    losses = []
    for of in (model.train(), plain.train()):
        torch.manual_seed(5)
        losses.append(of(input_ids, mask, labels=input_ids).loss)
    torch.testing.assert_close(*losses)
    losses[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_sampled_losses_compute_the_vectors_of_sampled_items_alone(loss, monkeypatch):
    model, _ = featured_model(training_loss=loss, num_negatives=2)
    computed = []
    vectors = item_features.ItemFeatures.vectors

    def watch(self, embed_tokens, token_ids):
        computed.append(token_ids.numel())
        return vectors(self, embed_tokens, token_ids)

    monkeypatch.setattr(item_features.ItemFeatures, "vectors", watch)
    input_ids = torch.tensor([[7, 8, 9]])
    labels = torch.tensor([[-100, -100, 10]])
    model.train()(input_ids, labels=labels).loss.backward()
    of_input, of_loss = computed
    assert of_input == 3 and of_loss <= 3


@pytest.mark.parametrize("item_id_dropout", [0.4, 1.0])
@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_prefixes_leave_ids_out_as_all_positions_do(loss, item_id_dropout):
    """Loss and gradients of the last position; without any id, all that is learned is what the features add."""
    changes = {"training_loss": loss, "item_id_dropout": item_id_dropout, "num_memory_subkeys": 0}
    model, _ = featured_model(training_objective="prefix", hidden_dropout=0.0, **changes)
    model.train().double()
    input_ids, mask = histories()
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = torch.tensor([9, 5, 20])
    torch.manual_seed(5)
    alone = model(input_ids, mask, labels=labels).loss
    torch.manual_seed(5)
    everywhere = model.model(input_ids, mask, last_position_only=False).last_hidden_state
    expected = model.loss(everywhere, input_ids, labels)
    torch.testing.assert_close(alone, expected)
    weights = dict(model.named_parameters())
    found, wanted = (torch.autograd.grad(total, [*weights.values()]) for total in (alone, expected))
    for name, one, other in zip(weights, found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=name)
        assert one.isfinite().all()
        assert (one.abs().sum() > 0) == (item_id_dropout < 1 or "embed_tokens" not in name), name


def test_ids_are_left_out_in_training_alone():
    model, _ = featured_model(item_id_dropout=1.0)
    features, embed = model.model.item_features, model.get_input_embeddings()
    token_ids = torch.arange(3, NUM_TOKENS)
    model.train()
    torch.testing.assert_close(features.vectors(embed, token_ids), features(token_ids))
    torch.testing.assert_close(features.head(embed).weight[3:], features(token_ids))
    model.eval()
    torch.testing.assert_close(features.vectors(embed, token_ids), embed(token_ids) + features(token_ids))


def test_the_catalogue_is_computed_once_and_in_chunks(monkeypatch):
    monkeypatch.setattr(item_features, "MAX_ROWS", 9)
    model, _ = featured_model()
    rows = []
    forward = item_features.ItemFeatures.forward
    monkeypatch.setattr(
        item_features.ItemFeatures, "forward", lambda self, ids: (rows.append(len(ids)), forward(self, ids))[1]
    )
    for _ in range(3):
        model.recommend(histories()[0], top_k=2)
    assert max(rows) == 9 and sum(rows) == item_features.BLOCK
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    model.recommend(histories()[0], top_k=2)
    assert sum(rows) == 2 * item_features.BLOCK


@pytest.mark.parametrize("keeps_gradients", [True, False])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_vectors_are_those_after_training_on(options, keeps_gradients):
    model, _ = featured_model()
    input_ids = histories()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        model.recommend(input_ids, top_k=3)
        model.train()(input_ids, labels=input_ids).loss.backward()
        model.eval().recommend(input_ids, top_k=3)
        optimizer.step()
        if not keeps_gradients:
            optimizer.zero_grad()
        expected = copy.deepcopy(model).recommend(input_ids, top_k=3)
        torch.testing.assert_close(model.recommend(input_ids, top_k=3).scores, expected.scores)


def test_a_model_without_features_is_as_it_was():
    model = elastic_model()
    assert model.model.item_features is None and model.scoring_head() is model.lm_head
    assert not any("item_features" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="add_items needs a model with item_features"):
        model.add_items(None, item_table([1]))
    with pytest.raises(ValueError, match="set_item_features needs a configuration with item_features"):
        model.set_item_features({})


def test_checkpoints_carry_the_features(featured, tmp_path):
    model, tokenizer = featured
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt"), *tmp_path.glob("*.pkl")]
    loaded = ElasticForSequentialRecommendation.from_pretrained(tmp_path)
    same = ElasticItemTokenizer.from_pretrained(tmp_path)
    input_ids = histories()[0]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert same.item_features == tokenizer.item_features == loaded.config.item_features
    new = item_table([7, 8], seed=1)
    for name, encoded in tokenizer.item_encoder.encode(tokenizer.item_encoder.check(new)).items():
        assert torch.equal(same.item_encoder.encode(same.item_encoder.check(new))[name], encoded)
    ElasticItemTokenizer.from_items([1, 2], model_max_length=5).save_pretrained(tmp_path)
    assert ElasticItemTokenizer.from_pretrained(tmp_path).item_features is None


def test_features_of_other_shapes_are_refused(featured):
    model, tokenizer = copy.deepcopy(featured)
    encoded = tokenizer.encode_item_features(item_table(range(100, 128)))
    with pytest.raises(ValueError, match=r"item feature 'price' must have shape \(28, 1\), found \(27, 1\)"):
        model.set_item_features(encoded | {"price": encoded["price"][1:]})
    with pytest.raises(ValueError, match="item features must be brand, price, tags, vector, found brand, price, tags"):
        model.set_item_features({name: encoded[name] for name in ("brand", "price", "tags")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_features": {}}, "item_features must name a feature"),
        ({"item_features": {"a": {"kind": "colour", "size": 1}}}, r"item_features\['a'\] must have a kind among"),
        ({"item_features": {"a": {"kind": "number"}}}, r"item_features\['a'\] must have a kind"),
        ({"item_features": {"a": {"kind": "categories", "size": 3, "length": 0}}}, "a length of at least 1"),
        ({"item_features": {"a": {"kind": "number", "size": 1}}, "tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"item_id_dropout": 1.5}, "item_id_dropout must be between 0 and 1, found 1.5"),
        ({"num_added_items": -1}, "num_added_items must be at least 0, found -1"),
    ],
)
def test_configurations_are_checked(changes, message):
    with pytest.raises(Exception, match=message):
        elastic_config(**changes)


def test_models_that_read_no_features_refuse_them():
    with pytest.raises(Exception, match="item_features must be None for sasrec"):
        SASRecConfig(item_features={"a": {"kind": "number", "size": 1}})


@torch.no_grad()
def test_known_items_stay_as_they_were_when_more_come(featured, tmp_path):
    model, tokenizer = copy.deepcopy(featured)
    input_ids, mask = histories()
    before = model(input_ids, mask, use_cache=True)
    digest = model.model.digest()
    token_ids = model.add_items(tokenizer, item_table([3, 1, 2], seed=1))
    assert token_ids.tolist() == [NUM_TOKENS, NUM_TOKENS + 1, NUM_TOKENS + 2]
    assert tokenizer.convert_tokens_to_ids([100, 127, 3, 1, 2]) == [3, NUM_TOKENS - 1, *token_ids.tolist()]
    assert tokenizer.convert_ids_to_titles(token_ids) == ["Item no. 3", "Item no. 1", "Item no. 2"]
    assert len(tokenizer) == model.config.vocab_size == model.lm_head.out_features == NUM_TOKENS + 3
    after = model(input_ids, mask, use_cache=True)
    assert torch.equal(after.logits[:, :NUM_TOKENS], before.logits)
    assert model.model.digest() == digest
    step = model(token_ids[:, None], cache=before.cache)
    whole = model(torch.cat([input_ids, token_ids[:, None]], dim=1), torch.cat([mask, torch.ones(3, 1)], dim=1).int())
    torch.testing.assert_close(step.logits, whole.logits)

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = ElasticForSequentialRecommendation.from_pretrained(tmp_path).eval()
    same = ElasticItemTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids, mask, cache=None).logits, after.logits)
    more = loaded.add_items(same, item_table(range(10, 80), seed=2))
    assert torch.equal(loaded(input_ids, mask).logits[:, : NUM_TOKENS + 3], after.logits)
    assert loaded.config.num_added_items == 3 + len(more) and loaded.model.digest() == digest


@torch.no_grad()
def test_a_new_item_is_what_its_features_say(featured):
    model, tokenizer = copy.deepcopy(featured)
    known = item_table(range(100, 128)).slice(9, 1)
    (token_id,) = model.add_items(tokenizer, known.set_column(0, "item_id", pa.array([9])))
    features = model.model.item_features
    torch.testing.assert_close(features(torch.tensor([token_id])), features(torch.tensor([12])))


@torch.no_grad()
def test_a_new_item_takes_the_id_of_those_that_are_like_it(featured):
    model, tokenizer = copy.deepcopy(featured)
    known = item_table(range(100, 128))
    twin = known.slice(9, 1).set_column(0, "item_id", pa.array([9]))
    (token_id,) = model.add_items(tokenizer, twin)
    weight = model.get_input_embeddings().weight
    directions = model.model.item_features.directions(torch.arange(NUM_TOKENS + 1))
    torch.testing.assert_close(directions[token_id], directions[12])
    expected = borrow_ids(directions[token_id:], [directions[3:NUM_TOKENS]], weight[3:NUM_TOKENS])
    torch.testing.assert_close(weight[token_id], expected[0])
    (again,) = model.add_items(tokenizer, twin.set_column(0, "item_id", pa.array([10])))
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[again], weight[token_id])  # a new item borrows from no new one
    (larger,) = model.add_items(tokenizer, twin.set_column(0, "item_id", pa.array([11])), id_scale=1.5)
    (alone,) = model.add_items(tokenizer, twin.set_column(0, "item_id", pa.array([12])), id_scale=0)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[larger], 1.5 * weight[token_id])
    assert not weight[alone].any()


@pytest.mark.parametrize("id_scale", [-1.0, math.inf, math.nan])
def test_id_scales_are_checked(featured, id_scale):
    model, tokenizer = copy.deepcopy(featured)
    with pytest.raises(ValueError, match="id_scale must be a finite number of at least 0, found"):
        model.add_items(tokenizer, item_table([1]), id_scale)
    assert len(tokenizer) == model.config.vocab_size == NUM_TOKENS


@torch.no_grad()
def test_new_items_with_more_categories_than_any_other_and_unknown_ones(featured, caplog):
    model, tokenizer = copy.deepcopy(featured)
    input_ids = histories()[0]
    before = model(input_ids).logits
    table = item_table([1, 2], seed=1)
    tags = [["tag 0", "tag 1", "tag 2", "tag 0", "tag 2"], ["no such tag", "tag 1"]]
    table = table.set_column(table.column_names.index("tags"), "tags", pa.array(tags))
    model.add_items(tokenizer, table)
    assert model.config.item_features["tags"] == {"kind": "categories", "size": 3, "length": 5}
    assert "'tags': 1 categories are not in the vocabulary and left out, such as 'no such tag'" in caplog.text
    assert torch.equal(model(input_ids).logits[:, :NUM_TOKENS], before)
    tags = model.model.item_features.features[model.model.item_features.names.index("tags")]
    assert tags.encoded[-2:].tolist() == [[1, 2, 3, 1, 3], [2, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (item_table([100, 5]), "new items must not be known, found 100"),
        (item_table([5, 5]), "item ids must be unique, found 5 more than once"),
        (item_table(["5"]), "new item ids must be int64, found string"),
        (item_table([5]).drop_columns("brand"), "item features must be columns of the items, .* found 'brand'"),
        (item_table([5]).slice(0, 0), "items must list at least one item, found none"),
        ([5, 6], "items must be a table of datasets, Arrow or polars, found list"),
    ],
)
def test_new_items_that_cannot_be_added_change_nothing(featured, table, message):
    model, tokenizer = copy.deepcopy(featured)
    state = model.state_dict()
    with pytest.raises(ValueError, match=message):
        model.add_items(tokenizer, table)
    assert len(tokenizer) == model.config.vocab_size == NUM_TOKENS
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert tokenizer.item_features == model.config.item_features


def test_a_catalogue_with_features_grows_by_add_items_alone(featured):
    model, tokenizer = copy.deepcopy(featured)
    with pytest.raises(ValueError, match="resize_token_embeddings must not be called with item_features"):
        model.resize_token_embeddings(40)
    tokenizer.add_items(item_table([5]))
    with pytest.raises(ValueError, match="tokenizer must be that of the model, with 31 tokens"):
        model.add_items(tokenizer, item_table([6]))


def test_an_index_grows_with_the_model(featured):
    pytest.importorskip("faiss", reason="needs FAISS: pip install faiss-cpu")
    model, tokenizer = copy.deepcopy(featured)
    input_ids = histories()[0]
    index = ItemIndex(model, num_clusters=4, num_probes=4)
    model.add_items(tokenizer, item_table(range(20), seed=1))
    with pytest.raises(ValueError, match="build it again"):
        model.recommend(input_ids, index=index)
    index.add_items(model)
    found, expected = model.recommend(input_ids, index=index, top_k=20), model.recommend(input_ids, top_k=20)
    assert torch.equal(found.token_ids, expected.token_ids) and (found.token_ids >= NUM_TOKENS).any()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    with pytest.raises(ValueError, match="index must hold the first 48 items of this model, found others"):
        index.add_items(model)


@torch.no_grad()
def test_a_state_belongs_to_the_features_that_it_was_made_with(featured):
    model, _ = copy.deepcopy(featured)
    input_ids = histories()[0]
    cache, digest = model(input_ids, use_cache=True).cache, model.model.digest()
    for feature in model.model.item_features.features:
        feature.encoded[5:7] = feature.encoded[[6, 5]]
        assert model.model.digest() != digest
        digest = model.model.digest()
    with pytest.raises(ValueError, match="cache.model_digest must be that of this model"):
        model(input_ids, cache=cache)


@pytest.mark.parametrize("missing", [(), ("model.item_features.features.1.encoded",)])
def test_what_a_checkpoint_lacks_is_zeros_and_the_rest_is_loaded(featured, tmp_path, missing):
    model, _ = featured
    weights = {name: weight for name, weight in model.state_dict().items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, info = ElasticForSequentialRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert {*info["missing_keys"]} == {*missing}
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, torch.zeros_like(buffer) if name in missing else model.get_buffer(name))


def test_features_are_named_in_any_order(featured):
    _, tokenizer = featured
    assert [*tokenizer.item_features] == ITEM_FEATURES != sorted(ITEM_FEATURES)
    reordered = elastic_model(item_features=dict(sorted(tokenizer.item_features.items())))
    other = elastic_model(item_features=tokenizer.item_features)
    assert {name: w.shape for name, w in reordered.state_dict().items()} == {
        name: w.shape for name, w in other.state_dict().items()
    }
