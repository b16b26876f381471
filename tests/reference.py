"""Slow, obvious loop versions of the mathematics: what the fast code in elastic_hf must equal."""

import math

import torch


def causal_lda(query, key, value, scores, log_forget, bias=None):
    """(B, H, L, K) queries, keys, values and (B, H, L, E) scores, log-forgetting and what is added to the experts'
    logits -> (B, H, L, K), term by term."""
    B, H, L, K = query.shape
    E = scores.shape[-1]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(L):
                logits, interests = [], []
                for m in range(E):
                    kept = log_forget[b, h, :, m].cumsum(dim=0)
                    weights = torch.exp(scores[b, h, : t + 1, m] + kept[t] - kept[: t + 1])
                    total = weights.sum()
                    if total == 0:
                        logits.append(query.new_zeros(()))
                        interests.append(query.new_zeros(K))
                        continue
                    compressed_key = (weights[:, None] * key[b, h, : t + 1]).sum(dim=0) / total
                    logits.append(query[b, h, t] @ compressed_key / math.sqrt(K))
                    interests.append((weights[:, None] * value[b, h, : t + 1]).sum(dim=0) / total)
                logits = torch.stack(logits)
                shares = (logits if bias is None else logits + bias[b, h, t]).softmax(dim=0)
                rows.append(sum(shares[m] * interests[m] for m in range(E)))
    return torch.stack(rows).reshape(B, H, L, K)


def pool_history(stream, scores, log_forget, attention_mask):
    """(B, L, D) streams, (B, L, M) scores, (M,) or (B, L, M) log-forgetting, (B, L) masks -> (B, M, D + 1), item by
    item."""
    log_forget = log_forget.expand_as(scores)
    rows = []
    for b in range(stream.shape[0]):
        for m in range(scores.shape[-1]):
            state = stream.new_zeros(stream.shape[-1] + 1)
            for t in range(stream.shape[1]):
                if attention_mask[b, t]:
                    item = torch.cat([stream[b, t], stream.new_ones(1)])
                    state = log_forget[b, t, m].exp() * state + scores[b, t, m].exp() * item
            rows.append(state)
    return torch.stack(rows).unflatten(0, (stream.shape[0], -1))


def pauses_before(times):
    """Seconds since the event before each, -1 for the first: a list of numbers -> a list of as many."""
    return [-1 if t == 0 else times[t] - times[t - 1] for t in range(len(times))]


def time_bucket(seconds):
    """1 + floor(log2(1 + s)), 33 at most, and 0 for -1, by counting the binary digits of 1 + s."""
    return 0 if seconds == -1 else min(33, len(f"{1 + int(seconds):b}"))


def time_phases(seconds):
    """Cosines, then sines, of a moment in its day, week and year; zeros for -1."""
    if seconds == -1:
        return [0.0] * 6
    angles = [2 * math.pi * (seconds % period) / period for period in (86_400, 604_800, 365.2425 * 86_400)]
    return [*map(math.cos, angles), *map(math.sin, angles)]


def event_vector(module, values):
    """What an `EventFeatures` adds for one event: (F,) categories and numbers -> (D,), weight by weight."""
    return sum(
        feature.weight[:, 0] * value if isinstance(feature, torch.nn.Linear) else feature.weight[int(value)]
        for feature, value in zip(module.features, values, strict=True)
    )


def user_embeddings(model, input_ids, attention_mask, timestamps=None, request_timestamps=None, event_features=None):
    """The user embedding of an `ElasticModel` at every item of (B, L) histories, zeros at padding: (B, L, D).

    One user, position, layer, head and expert at a time, from the compressed interests themselves. The interest memory
    and the feed-forward blocks work on one vector alone, and so are called on it. Timestamps and the times of what
    comes after each item, -1 where that is not known, are (B, L), too; features of the events are (B, L, F).
    """
    config = model.config
    D, H, E = config.hidden_size, config.num_attention_heads, config.num_interest_experts
    K = D // H
    experts, convolution = model.experts, model.stream.convolution
    key_value = [projection.weight.view(len(model.layers), 2, K, D) for projection in model.key_value]
    output = []
    for b, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        rows = [torch.zeros(D, dtype=convolution.dtype) for _ in range(int((mask == 0).sum()))]
        embedded, normed, stream = [], [], []
        if timestamps is not None:
            seconds, requests = timestamps[b][mask == 1].tolist(), request_timestamps[b][mask == 1].tolist()
            pauses = pauses_before(seconds)
        for item in ids[mask == 1]:
            embedded.append(model.embed_tokens.weight[item])
            if event_features is not None:
                values = event_features[b][mask == 1][len(stream)]
                embedded[-1] = embedded[-1] + event_vector(model.event_features, values)
            if timestamps is not None:
                phases = torch.tensor(time_phases(seconds[len(stream)]), dtype=convolution.dtype)
                pause = model.time.pause.weight[time_bucket(pauses[len(stream)])]
                embedded[-1] = embedded[-1] + pause + model.time.phases.weight @ phases
            normed.append(model.stream.norm(embedded[-1]))
            t = len(stream)
            x = normed[t] + sum(convolution[i] * normed[t - i] for i in range(min(len(convolution), t + 1)))
            stream.append(x if model.stream.feed_forward is None else model.stream.feed_forward(x))
            h = math.sqrt(D) * embedded[t]
            first = stream[t]
            if timestamps is not None:
                elapsed = -1 if requests[t] == -1 else requests[t] - seconds[t]
                phases = torch.tensor(time_phases(requests[t]), dtype=convolution.dtype)
                request = model.time.elapsed.weight[time_bucket(elapsed)] + model.time.request_phases.weight @ phases
                h, first = h + math.sqrt(D) * request, first + math.sqrt(D) * request
            for n, layer in enumerate(model.layers):
                attention = layer.attention
                reader = first if n == 0 else attention.norm(h)
                q, g = attention.query(reader), attention.gate(reader)
                heads = []
                for head in range(H):
                    logits, values = [], []
                    for m in range(E):
                        P = experts.experts[head, m]
                        half_life = 1 + experts.log_half_life[head, m].exp()
                        forgotten = [(t - j) / half_life for j in range(t + 1)]
                        if timestamps is not None:
                            half_life = experts.log_half_life_seconds[head, m].exp()
                            for j in range(t + 1):
                                for pause in pauses[j + 1 : t + 1]:
                                    forgotten[j] = forgotten[j] + (pause / half_life).clamp(max=2)
                        a = [
                            torch.exp(10 * torch.tanh(P @ stream[j] / 10)) * 0.5 ** forgotten[j] for j in range(t + 1)
                        ]
                        c = sum(a[j] * stream[j] for j in range(t + 1)) / sum(a)
                        W_k, W_v = key_value[head][n]  # (K, D)
                        logits.append(q[head * K : (head + 1) * K] @ (W_k @ c) / math.sqrt(K))
                        if timestamps is not None:
                            logits[-1] = logits[-1] + model.time.expert_bias.weight[time_bucket(elapsed), head * E + m]
                        values.append(W_v @ c)
                    shares = torch.stack(logits).softmax(dim=0)
                    heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
                h = h + attention.output(torch.cat(heads) * torch.nn.functional.silu(g))
                if layer.retrieval is not None:
                    h = layer.retrieval(h[None, None], torch.ones(1, 1, dtype=torch.bool))[0, 0]
                h = layer.feed_forward(h)
            rows.append(model.norm(h))
        output.append(torch.stack(rows))
    return torch.stack(output)


def attend(query, key, value, attention_mask):
    """Softmax attention of (B, H, Q, K) readers over the (B, H, L, K) positions that (B, L) marks, one by one."""
    B, H, Q, K = query.shape
    rows = []
    for b in range(B):
        real = attention_mask[b].nonzero()[:, 0].tolist()
        for h in range(H):
            for i in range(Q):
                if not real:
                    rows.append(query.new_zeros(K))
                    continue
                logits = torch.stack([query[b, h, i] @ key[b, h, j] / math.sqrt(K) for j in real])
                weights = logits.softmax(dim=0)
                rows.append(sum(weights[n] * value[b, h, j] for n, j in enumerate(real)))
    return torch.stack(rows).reshape(B, H, Q, K)


def hstu(model, input_ids, attention_mask, timestamps=None, request_timestamps=None):
    """The vectors of an `HSTUModel` at the items of each history: a list of (n, D), one position after the other.

    Timestamps and the times of what comes after each item, -1 where that is not known, are (B, L).
    """
    config = model.config
    D, H, n = config.hidden_size, config.num_attention_heads, config.max_position_embeddings

    def silu(x):
        return x / (1 + torch.exp(-x))

    def norm(x):
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + config.layer_norm_eps)

    output = []
    for b, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        ids = ids[mask == 1]
        if timestamps is not None:
            seconds, requests = timestamps[b][mask == 1].tolist(), request_timestamps[b][mask == 1].tolist()
        positions = model.embeddings.embed_positions.weight[n - len(ids) :]
        x = list(math.sqrt(D) * model.embeddings.embed_tokens.weight[ids] + positions)
        for layer in model.layers:
            attention = layer.attention
            u, q, k, v = (
                [silu(projection.weight @ norm(row)) for row in x]
                for projection in (layer.gate, attention.query, attention.key, attention.value)
            )
            bias = attention.position_bias.weight[:, 0]
            for t in range(len(ids)):
                heads = []
                biases = [bias[t - j] for j in range(t + 1)]
                if timestamps is not None:
                    until = seconds[t] if requests[t] == -1 else requests[t]
                    for j in range(t + 1):
                        bucket = int(math.log(max(1, until - seconds[j])) / 0.301)
                        biases[j] = biases[j] + attention.time_bias.weight[bucket, 0]
                for part in torch.arange(D).chunk(H):
                    weights = [silu(q[t][part] @ k[j][part] + biases[j]) / n for j in range(t + 1)]
                    heads.append(sum(weights[j] * v[j][part] for j in range(t + 1)))
                x[t] = x[t] + layer.output.weight @ (u[t] * norm(torch.cat(heads))) + layer.output.bias
        output.append(torch.stack([norm(row) * model.norm.weight + model.norm.bias for row in x]))
    return output


def lrurec(model, input_ids, attention_mask):
    """The vectors of an `LRURecModel` at the items of each history: a list of (n, D), one item after the other."""
    output = []
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        rows = [model.norm(model.embed_tokens.weight[item]) for item in ids[mask == 1]]
        for layer in model.layers:
            unit = layer.attention
            B, b, C = unit.input.weight, unit.input.bias, unit.output.weight
            modulus, angle = torch.exp(-torch.exp(unit.log_decay)), torch.exp(unit.log_angle)
            real = imaginary = torch.zeros_like(modulus)
            for t, x in enumerate(rows):
                read = torch.exp(unit.log_scale), B @ x + b
                real, imaginary = (
                    modulus * (angle.cos() * real - angle.sin() * imaginary) + read[0] * read[1][0::2],
                    modulus * (angle.sin() * real + angle.cos() * imaginary) + read[0] * read[1][1::2],
                )
                x = layer.attention_norm(x + C[:, 0::2] @ real + C[:, 1::2] @ imaginary + unit.output.bias)
                first, _, second = layer.feed_forward
                inner = first.weight @ x + first.bias
                inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
                rows[t] = layer.feed_forward_norm(x + second.weight @ inner + second.bias)
        output.append(torch.stack(rows))
    return output


def bidirectional_layer(hidden_states, experts, attention_mask, attention):
    """The paper's two attentions with the weights of an `ElasticBidirectionalAttention`, head by head."""
    H = attention.num_heads

    def heads(states):
        return torch.stack(states.chunk(H, dim=-1), dim=1)  # (B, H, L, K)

    interests = attend(
        heads(attention.aggregate_query(experts)),
        heads(attention.aggregate_key(hidden_states)),
        heads(attention.aggregate_value(hidden_states)),
        attention_mask,
    )
    interests = torch.cat(interests.unbind(dim=1), dim=-1)  # (B, E, D)
    output = attend(
        heads(attention.dispatch_query(hidden_states)),
        heads(attention.dispatch_key(interests)),
        heads(attention.dispatch_value(interests)),
        torch.ones(interests.shape[:2], dtype=torch.bool),
    )
    return attention.output(torch.cat(output.unbind(dim=1), dim=-1))


def retrieve_slots(query, sub_keys, bias, top_k):
    """The top_k of all S x S slots, every one scored: (..., G, 2, key_size) queries -> scores and slots."""
    first, second = sub_keys[:, 0], sub_keys[:, 1]  # (G, S, key_size)
    G, S, _ = first.shape
    all_scores = []
    for g in range(G):
        one = [query[..., g, 0, :] @ first[g, i] + bias[g, 0, i] for i in range(S)]
        two = [query[..., g, 1, :] @ second[g, j] + bias[g, 1, j] for j in range(S)]
        all_scores.append(torch.stack([one[i] + two[j] for i in range(S) for j in range(S)], dim=-1))
    return torch.stack(all_scores, dim=-2).topk(top_k, dim=-1)


def causal_convolution(hidden_states, weight):
    """y_t = x_t + sum_i weight_i * x_(t-i) over the positions that exist."""
    output = hidden_states.clone()
    for t in range(hidden_states.shape[1]):
        for i in range(min(weight.shape[0], t + 1)):
            output[:, t] += weight[i] * hidden_states[:, t - i]
    return output


def softmax_loss(scores, targets):
    """Sum over rows of -log softmax at the target."""
    return sum(-torch.log(torch.exp(row[t]) / torch.exp(row).sum()) for row, t in zip(scores, targets, strict=True))


def rank_targets(users, items, targets, seen, num_special_tokens):
    """Ranks without and with the seen items: one user, one item at a time, in Python numbers."""
    ranks = []
    for user, target, seen_row in zip(users.tolist(), targets.tolist(), seen.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(user, item, strict=True)) for item in items.tolist()]
        others = [i for i in range(num_special_tokens, len(scores)) if i != target and not scores[i] < scores[target]]
        excluded = len(scores) - num_special_tokens
        if target not in seen_row:
            excluded = 1 + sum(i not in seen_row for i in others)
        ranks.append([excluded, 1 + len(others)])
    return ranks


def best_items(scores, allowed, top_k):
    """The allowed ids by falling score, one list per row."""
    return [
        sorted(ids, key=lambda i, row=row: -row[i])[:top_k] for row, ids in zip(scores.tolist(), allowed, strict=True)
    ]


def items_in_loss(token_ids, row, position, target, candidates):
    """What a target competes with, itself included: the candidates that its row has not read up to the position."""
    seen = token_ids[row, : position + 1].tolist()
    return [item for item in candidates if item == target or item not in seen]


def assert_equal_with_gradients(output, expected, weights):
    """Assert that two computations from the same weights agree, and so do their gradients, none of which is zero."""
    weights = list(weights)
    torch.testing.assert_close(output, expected)
    gradients, wanted = (torch.autograd.grad(x.square().sum() + x.sin().sum(), weights) for x in (output, expected))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
        assert want.abs().max() > 1e-6


def item_vector(features, id_embeddings, token_id):
    """The vector of one item, feature by feature and category by category: (D,)."""
    vector = id_embeddings[token_id]
    for feature in features.features:
        encoded = feature.encoded[token_id]
        if encoded.is_floating_point():
            vector = vector + feature.linear.weight @ encoded
            continue
        categories = [int(category) for category in encoded if category > 0]
        for category in categories:
            vector = vector + feature.embedding.weight[category] / len(categories)
    return vector


def borrow_ids(new, known, id_embeddings, num_nearest):
    """Sum the id embeddings of the nearest known items by their cosines, at the mean length: (N, C), (V, C) and
    (V, D) -> (N, D)"""
    mean_length = sum(math.sqrt(sum(x * x for x in row.tolist())) for row in id_embeddings) / len(id_embeddings)
    borrowed = torch.zeros(len(new), id_embeddings.shape[1])
    for n, direction in enumerate(new):
        cosines = [sum(a * b for a, b in zip(direction.tolist(), other.tolist(), strict=True)) for other in known]
        nearest = sorted(range(len(known)), key=lambda v: -cosines[v])[:num_nearest]
        for v in nearest:
            borrowed[n] += max(cosines[v], 0.0) * id_embeddings[v]
        length = math.sqrt(sum(x * x for x in borrowed[n].tolist()))
        if length > 0:
            borrowed[n] *= mean_length / length
    return borrowed
