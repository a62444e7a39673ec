"""Structured output in the engine: masks, forced tokens and ends, beside rows that are free."""

import copy

import numpy as np
import pytest
import tiny_llm
from engine_client import complete, make_engine, start
from llm_oracle import logits

PROMPT = [10, 20, 30]
END = 289


class Rule:
    """After token t comes t + 1 or t + 2 (mod 100); after a multiple of 5, 101 102 103, then 7.

    Ends the text after ``most`` tokens; before that, the end-of-text token may not come.
    """

    def __init__(self, most):
        self.tokens, self.most = [], most

    def _next(self):
        if not self.tokens:
            return [3, 4, 6]
        last = self.tokens[-1]
        if last in (101, 102):
            return [last + 1]
        if last == 103:
            return [7]
        return [101] if last % 5 == 0 else [(last + 1) % 100, (last + 2) % 100]

    def accept(self, tokens):
        for token in tokens:
            assert token in self._next()
            self.tokens.append(token)

    def mask(self, out):
        out[:] = 0
        for token in self._next():
            out[token // 32] |= np.uint32(1 << token % 32)

    def forced(self):
        ahead = copy.copy(self)
        ahead.tokens = list(self.tokens)
        while len(ahead._next()) == 1:
            ahead.tokens += ahead._next()
        return ahead.tokens[len(self.tokens) :]

    @property
    def finished(self):
        return len(self.tokens) >= self.most


class Endless(Rule):
    """A rule that allows every token, the end of text too."""

    def accept(self, tokens):
        self.tokens += tokens

    def mask(self, out):
        out[:] = 0xFFFFFFFF

    def forced(self):
        return []


class Broken(Rule):
    """Raises in the method that it is named after, at its third token."""

    def __init__(self, method):
        super().__init__(99)
        self._method = method

    def _fail(self, method):
        if method == self._method and len(self.tokens) >= 3:
            raise LookupError("no such rule")

    def accept(self, tokens):
        self._fail("accept")
        super().accept(tokens)

    def mask(self, out):
        self._fail("mask")
        super().mask(out)

    def forced(self):
        self._fail("forced")
        return super().forced()


@pytest.fixture(scope="module")
def made():
    """The rules that the engine has made, in order."""
    return []


@pytest.fixture(scope="module")
def engine(made):
    def constraints(wanted):
        def factory():
            made.append(wanted())
            return made[-1]

        return factory

    engine = make_engine(constraints=constraints)
    yield engine
    engine.close()


def expected(prompt, most, steps):
    """The best tokens under `Rule`, from the model's logits alone."""
    rule = Rule(most)
    while len(rule.tokens) < steps and not rule.finished:
        allowed = rule._next()
        row = logits(tiny_llm.shared_llm(), [*prompt, *rule.tokens])[-1]
        rule.accept([max(allowed, key=lambda token: row[token])])
    return rule.tokens


def constrained(engine, prompt=PROMPT, rule=lambda: Rule(24), **params):
    listener, _ = start(engine, prompt, rule=rule, **{"max_tokens": 40, **params})
    return listener


def test_only_allowed_tokens_are_chosen_and_forced_ones_follow(engine, made):
    listener = constrained(engine)
    (output,) = listener.wait().outputs
    assert output.token_ids[:24] == expected(PROMPT, 24, 24)
    assert output.finish_reason == "stop"
    assert output.token_ids == made[-1].tokens  # each was accepted once, in order
    assert 101 in output.token_ids
    assert max(len(delta.token_ids) for delta in listener.deltas) >= 5  # a choice, and four forced


def test_forced_tokens_skip_steps(engine):
    before = engine.totals.steps
    (output,) = constrained(engine).wait().outputs
    sampled = len(output.token_ids) - 4 * output.token_ids.count(101)
    assert engine.totals.steps - before <= sampled + output.token_ids.count(101) + 2


def test_with_logprobs_every_token_is_sampled_and_they_are_the_same(engine):
    (plain,) = constrained(engine, max_tokens=20).wait().outputs
    (output,) = constrained(engine, max_tokens=20, logprobs=0).wait().outputs
    assert output.token_ids == plain.token_ids[:20]
    assert [list(entry) for entry in output.logprobs] == [[t] for t in output.token_ids]


def test_free_and_constrained_rows_leave_each_other_alone(engine):
    free = np.random.default_rng(3).integers(0, 256, (4, 30))
    seeded = {"temperature": 1.0, "seed": 4, "presence_penalty": 1.0}
    alone = [complete(engine, prompt, max_tokens=30)[0] for prompt in free]
    rules = [[40], [50, 51], [*range(30)]]
    held = [constrained(engine, prompt, **seeded).wait().outputs[0].token_ids for prompt in rules]
    assert len({tuple(each) for each in held}) > 1
    with engine.together():
        listeners = [start(engine, prompt, max_tokens=30)[0] for prompt in free]
        listeners += [constrained(engine, prompt, **seeded) for prompt in rules]
    found = [listener.wait().outputs[0].token_ids for listener in listeners]
    assert found == [*alone, *held]


def test_forced_tokens_end_at_the_limit(engine):
    tokens = expected(PROMPT, 24, 24)
    limit = tokens.index(102) + 1  # in the middle of forced ones
    (output,) = constrained(engine, max_tokens=limit).wait().outputs
    assert (output.token_ids, output.finish_reason) == (tokens[:limit], "length")


def test_a_text_that_is_forced_from_the_start_needs_no_step(engine):
    class Only(Rule):
        def _next(self):
            return ([7], [8], [9], [1, 2])[min(len(self.tokens), 3)]

    listener = constrained(engine, rule=lambda: Only(3))
    (output,) = listener.wait().outputs
    assert (output.token_ids, output.finish_reason) == ([7, 8, 9], "stop")
    assert [delta.token_ids for delta in listener.deltas] == [[7, 8, 9]]


def test_the_token_that_ends_the_text_is_not_accepted(engine, made):
    params = {"logit_bias": {END: 100.0}, "ignore_eos": False, "min_tokens": 2}
    (output,) = constrained(engine, rule=lambda: Endless(99), **params).wait().outputs
    assert (output.token_ids[-1], len(output.token_ids)) == (END, 3)
    assert made[-1].tokens == output.token_ids[:-1]


def test_a_rule_and_allowed_tokens_hold_together(engine):
    allowed = [4, 6, 7, 8]
    (output,) = constrained(engine, allowed_token_ids=allowed, max_tokens=2).wait().outputs
    assert set(output.token_ids) <= set(allowed)
    with pytest.raises(ValueError, match="leave no token"):
        constrained(engine, allowed_token_ids=allowed).wait()


def test_each_of_n_has_a_rule_of_its_own(engine, made):
    count = len(made)
    result = constrained(engine, n=3, temperature=1.0, seed=2).wait()
    assert [rule.tokens for rule in made[count:]] == [o.token_ids for o in result.outputs]
    assert len({tuple(o.token_ids) for o in result.outputs}) == 3


@pytest.mark.parametrize("method", ["accept", "mask", "forced"])
def test_a_rule_that_fails_ends_its_own_request_alone(engine, method):
    expected_tokens = complete(engine, PROMPT, max_tokens=20)
    with engine.together():
        free, _ = start(engine, PROMPT, max_tokens=20)
        broken = constrained(engine, rule=lambda: Broken(method))
    assert [o.token_ids for o in free.wait().outputs] == expected_tokens
    with pytest.raises(RuntimeError, match=r"request \d+: structured output .*no such rule"):
        broken.wait()
    assert engine.stats().pages_used == 0


def test_without_structured_output_it_is_refused():
    engine = make_engine()
    with pytest.raises(ValueError, match="no structured output here"):
        constrained(engine)
    engine.close()


def test_a_constrained_row_that_gave_its_pages_up_goes_on_where_it_was(engine):
    prompts = np.random.default_rng(5).integers(0, 256, (5, 50))
    rule = {"rule": lambda: Rule(70), "max_tokens": 80, "presence_penalty": 0.5}
    alone = [constrained(engine, p, **rule).wait().outputs[0].token_ids for p in prompts]
    before = engine.stats().preemptions
    with engine.together():
        listeners = [constrained(engine, prompt, **rule) for prompt in prompts]
    assert [each.wait().outputs[0].token_ids for each in listeners] == alone
    assert engine.stats().preemptions > before
