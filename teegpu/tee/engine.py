"""The engine: any number of sequences over one model, a step of all of them at a time.

A step is a list of spans: the next row of each sequence that generates, with its guesses, and chunks of prompts. One
prompt alone is a batch of one on the same path; its chunks overlap where the transport can. First come, first served:
rows that generate come first, so that nobody waits for a long prompt, then chunks, up to a budget of tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Final

import torch

from teegpu.errors import BadReplyError, BusyError, DeadlineError, PromptError, TeegpuError, UnmetError, prompt_too_long
from teegpu.model.spec import ModelSpec
from teegpu.record.events import DECODE, PREFILL, TEE, Admitted, Arrived, GaveWay, Left, Speculated, Stepped
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import drive
from teegpu.stats.traffic import chunk_edges
from teegpu.tee.decoder import Decoder, Span, Step, Turn, Want
from teegpu.tee.drafting import Drafter
from teegpu.tee.flights import Flights
from teegpu.tee.kv_cache import KVCache, Slabs, bytes_of
from teegpu.tee.prefixes import Prefixes
from teegpu.tee.rotary import Rotary
from teegpu.tee.sampling import Sampler
from teegpu.tee.sequence import Generation, OnToken, Sequence
from teegpu.tee.speculation import PromptLookup

AHEAD: Final = 256
"""Positions for tokens to come that a sequence gets room for when it begins."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """``sequences`` at once, ``waiting`` behind them; ``kv_bytes`` for the keys and values of all, prefixes included,
    of which ``prefix_bytes`` for prefixes at most. ``step_tokens``: of prompts, in a step that several sequences share.
    ``alone_tokens``: of a prompt that is read alone, in a step; None: all of it. ``answer_seconds``: for each, from its
    arrival on."""

    sequences: int = 1
    waiting: int = 1
    kv_bytes: int | None = None
    prefix_bytes: int = 0
    step_tokens: int = 256
    alone_tokens: int | None = None
    answer_seconds: float | None = None

    @property
    def chunk_tokens(self) -> int:
        """Of one prompt, at most, where several sequences share a step: two of them get into one."""
        return self.step_tokens // 2


@dataclass(slots=True)
class Part:
    """A sequence's part of a step: the tokens ``ids`` from ``start`` on."""

    sequence: Sequence
    start: int
    ids: list[int]
    want: Want
    drafts: list[int] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    @property
    def logits(self) -> int:
        return {"none": 0, "last": 1, "all": len(self.ids)}[self.want]

    def span(self) -> Span:
        return Span(torch.tensor(self.ids, dtype=torch.int64), self.start, self.sequence.held, self.want)


class Engine:
    """Generates with ``prefill`` and ``decode``, decoders that share ``rotary`` (and may be one).

    ``overlap``: the servers' clients can have several requests under way, so the chunks of a prompt run as coroutines,
    and the parts of a step where that is quicker. ``prepare`` is told before a sequence begins what all that
    run will compute at most: tokens of prompts, of how many prompts, and rows of decode; where it raises a
    ``TeegpuError`` that sequence ends with it. ``drafter`` guesses where the context itself does not.

    ``add`` and ``cancel`` may be called from any thread, all else from the one that computes.
    """

    def __init__(
        self,
        prefill: Decoder,
        decode: Decoder,
        *,
        spec: ModelSpec,
        rotary: Rotary,
        recorder: Recorder,
        chunk_tokens: int,
        overlap: bool = False,
        speculate: int = 0,
        max_positions: int | None = None,
        capacity: Capacity = Capacity(),
        prepare: Callable[[int, int, int], None] = lambda _, __, ___: None,
        drafter: Drafter | None = None,
    ) -> None:
        self._prefill_decoder = prefill
        self._decode_decoder = decode
        self._spec = spec
        self._rotary = rotary
        self._record = recorder
        self._chunk_tokens = chunk_tokens
        self._overlap = overlap
        self._speculate = 0 if rotary.depends_on_length else speculate
        self._drafter = drafter
        self.max_positions = spec.max_positions if max_positions is None else max_positions
        self.capacity = capacity
        self._prepare = prepare
        self._slabs = Slabs(spec, shared=capacity.sequences > 1, most=self.most_positions)
        self.prefixes = Prefixes(0 if rotary.depends_on_length else capacity.prefix_bytes)
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._numbers = itertools.count(1)
        # What became of requests since the last step: written down by the thread that computes.
        self._news: deque[Arrived | Left] = deque()
        # By whether prompts are read, and by how many sequences there are: 1, 2 to 3, 4 to 7, and so on.
        self._flights: defaultdict[tuple[bool, int, int], Flights] = defaultdict(Flights)
        # Of the step under way: see Stepped.
        self._rows: list[tuple[int, int, int]] = []
        # Of the phase of decode that is under way, which goes over many steps.
        self._decoding = False
        self._tokens = self._passes = 0

    # What others ask of it

    def generate(
        self,
        prompt: Several[int],
        *,
        max_tokens: int,
        sampler: Sampler,
        end_ids: Collection[int] = (),
        on_token: OnToken = lambda _: False,
        result: Generation | None = None,
    ) -> Generation:
        """Up to ``max_tokens`` tokens after ``prompt``, and nothing else meanwhile.

        ``result`` is filled as tokens are made, so an interrupted call leaves what there was. Raises what ``add``,
        ``step`` and ``prepare`` do."""
        done = Generation() if result is None else result
        errors: list[BaseException | None] = []
        sequence = Sequence(list(prompt), max_tokens, sampler, frozenset(end_ids), on_token, errors.append, done=done)
        self.add(sequence)
        try:
            while not sequence.ended:
                self.step()
        finally:
            sequence.cancelled = True
            self._drop()
        if errors and errors[0] is not None:
            raise errors[0]
        return done

    def add(self, sequence: Sequence) -> None:
        """Puts ``sequence`` in line. Raises ``PromptError`` for one that can never be computed, ``BusyError`` where the
        line is full."""
        tokens = len(sequence.tokens)
        if not tokens:
            raise PromptError(
                "the prompt is empty: give one as an argument, on standard input, or with --prompt-tokens"
            )
        if tokens > self.max_positions:
            raise prompt_too_long(tokens, self.max_positions)
        if (worst := max(sequence.tokens)) >= self._spec.vocab_size:  # a tokenizer may know more than the model
            raise PromptError(f"the prompt has token {worst}, and the model has {self._spec.vocab_size} tokens")
        if self._most(sequence) > self.most_positions:
            raise PromptError(
                f"a prompt of {tokens} tokens and {sequence.max_tokens} more are more than the {self.most_positions} "
                "whose keys and values fit into memory (api.kv_mib): ask for fewer"
            )
        if sequence.max_tokens <= 0:
            sequence.done.finish_reason = "length"
            self._end(sequence, None)
            return
        with self._changed:
            if len(self._waiting) + len(self._running) >= self.capacity.sequences + self.capacity.waiting:
                raise BusyError(f"{len(self._running)} requests run and {len(self._waiting)} wait: try again later")
            sequence.number = next(self._numbers)
            self._waiting.append(sequence)
            if self._serves:
                self._news.append(Arrived(sequence.times.added_ns, sequence.number, tokens, sequence.max_tokens))
            self._changed.notify_all()

    def cancel(self, sequence: Sequence) -> None:
        """Ends ``sequence``: before the next step all of it is gone."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Waits for something to do, at most ``seconds``."""
        with self._changed:
            if not self._running and not self._waiting:
                self._changed.wait(seconds)

    def fail(self, error: BaseException, *, waiting: bool = False) -> None:
        """Ends all that runs with ``error``, and all that waits where ``waiting``."""
        if waiting:
            with self._changed:
                gone = list(self._waiting)
                self._waiting.clear()
            for sequence in gone:
                self._end(sequence, error)
        for sequence in list(self._running):
            self._leave(sequence, error)
        while isinstance(error, BadReplyError) and self.prefixes.drop_one():
            pass  # who asks again would go on from what came of such replies, and fail again
        self._rest()
        self._tell()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_bytes(self) -> int:
        """Memory that keys and values take, prefixes included."""
        return self._slabs.nbytes

    @property
    def most_positions(self) -> int:
        """The longest that prompt and answer can be together."""
        if self.capacity.kv_bytes is None:
            return self.max_positions
        return min(self.max_positions, self.capacity.kv_bytes // bytes_of(self._spec, 1))

    def step(self) -> bool:
        """Computes a step of what there is. False where there is nothing.

        Raises what requests do; what ran then may go on, or be ended with ``fail``."""
        began_ns = self._record.clock_ns()
        self._drop()
        self._start_over()
        self._tell()
        self._admit()
        if not self._running:
            self._rest()
            return False
        running = self.running
        try:
            with torch.inference_mode():
                self._compute()
        except BaseException:
            self._rest()
            raise
        finally:
            self._tell_step(began_ns, running)
        if not self._running:
            self._rest()
        return True

    # What is told of it, where it serves several: of one prompt phases and tokens say all

    @property
    def _serves(self) -> bool:
        return self.capacity.sequences > 1

    def _tell(self) -> None:
        """Records what became of requests meanwhile."""
        while self._news:
            self._record.remark(self._news.popleft())

    def _tell_step(self, began_ns: int, running: int) -> None:
        """Records the step that was computed, as far as it came."""
        rows, self._rows = self._rows, []
        if rows and self._serves:
            now_ns = self._record.clock_ns()
            self._record.remark(Stepped(now_ns, began_ns, tuple(rows), running, self.waiting, self.kv_bytes))
        self._tell()

    # Who runs

    def _drop(self) -> None:
        """Ends those that were cancelled, and those that took too long."""
        with self._changed:
            gone = [sequence for sequence in self._waiting if sequence.cancelled or self._late(sequence)]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in gone:
            self._end(sequence, self._why(sequence))
        for sequence in [sequence for sequence in self._running if sequence.cancelled or self._late(sequence)]:
            self._leave(sequence, self._why(sequence))
        if not self._running:
            self._rest()

    def _late(self, sequence: Sequence) -> bool:
        most = self.capacity.answer_seconds
        return most is not None and self._record.clock_ns() - sequence.times.added_ns > most * 1e9

    def _why(self, sequence: Sequence) -> BaseException | None:
        if sequence.cancelled:
            return None
        return DeadlineError(
            f"an answer may take {self.capacity.answer_seconds:g} s (run.deadline_seconds): ask for less, or later"
        )

    def _start_over(self) -> None:
        """Those at whose length the angles of all positions change are read again."""
        for sequence in list(self._running):
            if not sequence.reading and self._rotary.changes_at(len(sequence.tokens)):
                self._give_way(sequence)

    def _give_way(self, sequence: Sequence) -> None:
        """Makes ``sequence`` wait, first in line; what it has is read again then."""
        sequence.cache, sequence.draft, sequence.edges = None, None, []
        with self._changed:
            self._running.remove(sequence)
            self._waiting.appendleft(sequence)

    def _admit(self) -> None:
        """Lets those begin that are first in line, as long as there is room."""
        while self._waiting and len(self._running) < self.capacity.sequences:
            sequence = self._waiting[0]
            tokens = len(sequence.tokens)
            most = self._most(sequence)
            # Who gave way once gets all of its room: it would have to again.
            room = most if sequence.made else min(tokens + AHEAD, most)
            if not self._fits(self._slabs.capacity(room)):
                return
            self._rest()
            cache = KVCache(self._spec, room, most, self._slabs)
            reused = self.prefixes.find(sequence.namespace, sequence.tokens, cache)
            sequence.cache = cache
            sequence.edges = chunk_edges(reused, tokens, self._chunk_tokens)[1:]
            if not sequence.made:
                sequence.done.reused_tokens = reused
                sequence.times.began_ns = self._record.clock_ns()
                sequence.lookup = PromptLookup(sequence.tokens) if self._speculate else None
            with self._changed:
                self._waiting.popleft()
                self._running.append(sequence)
            if self._serves:
                self._record.remark(Admitted(self._record.clock_ns(), sequence.number, reused))
            try:
                self._announce()
            except TeegpuError as error:  # what it takes can't be had; the others have theirs
                self._leave(sequence, error)

    def _announce(self) -> None:
        """Tells ``prepare`` what all that run may still compute."""
        prompts = [s for s in self._running if s.reading]
        unread = sum(s.edges[-1] - s.held.length for s in prompts)
        passes = [
            min(s.max_tokens - s.made - s.reading, self.max_positions - len(s.tokens) + (not s.reading))
            for s in self._running
        ]
        # Every pass of decoding may have all of its guesses in vain.
        self._prepare(unread, len(prompts), sum(passes) * (1 + self._speculate))

    def _most(self, sequence: Sequence) -> int:
        """Positions that ``sequence`` may come to have."""
        return min(len(sequence.tokens) + max(0, sequence.max_tokens - sequence.made), self.max_positions)

    def _fits(self, capacity: int) -> bool:
        """Whether keys and values of another ``capacity`` positions fit, once prefixes have made room for them."""
        most = self.capacity.kv_bytes
        if most is None:
            return True
        while self._slabs.nbytes + self._slabs.more_bytes(capacity) > most:
            if not self.prefixes.drop_one():
                return False
        return True

    def _grown(self, sequence: Sequence, positions: int) -> bool:
        """Makes room for ``positions`` of ``sequence``. Where there is none, the one that came last gives way: it
        waits, and is read again. False where that is ``sequence`` itself."""
        cache = sequence.held
        while (capacity := cache.grown(positions)) > cache.capacity and not self._fits(capacity):
            last = self._running[-1]
            self._give_way(last)
            if self._serves:
                self._record.remark(GaveWay(self._record.clock_ns(), last.number))
            if last is sequence:
                return False
        cache.reserve(positions)
        return True

    def _leave(self, sequence: Sequence, error: BaseException | None) -> None:
        with self._changed:
            self._running.remove(sequence)
        if sequence.cache is not None:
            # The keys of the last token come with the row after it; those of guesses that were wrong are nobody's.
            length = min(sequence.cache.length, len(sequence.tokens) - 1)
            self.prefixes.keep(sequence.namespace, sequence.tokens[:length], sequence.cache)
            sequence.cache = sequence.draft = None
        self._end(sequence, error)

    def _end(self, sequence: Sequence, error: BaseException | None) -> None:
        sequence.ended = True
        if self._serves and sequence.number:
            finish = sequence.done.finish_reason
            reason = "error" if error is not None else "abort" if finish == "interrupted" else finish
            self._news.append(Left(self._record.clock_ns(), sequence.number, reason))
        sequence.on_end(error)

    # A step

    def _compute(self) -> None:
        running = list(self._running)
        if len(running) == 1 and running[0].reading:
            self._read_alone(running[0])
            return
        if not any(sequence.reading for sequence in running):
            self._begin_decode(running)
        self._guess(running)
        parts = [part for sequence in running if (part := self.next_row(sequence)) is not None]
        parts = [part for part in parts if part.sequence.cache is not None]  # one may have given way since
        parts.sort(key=_place)
        chunks = list(self._chunks(running))
        if chunks:
            self._rest()
            self._record.begin(PREFILL, sum(len(part.ids) for part in chunks))
            try:
                self._together(parts, chunks)
            finally:
                self._record.end(sum(len(part.ids) for part in chunks), passes=1)
        else:
            self._begin_decode(running)
            self._passes += 1
            self._together(parts, [])

    def _begin_decode(self, running: list[Sequence]) -> None:
        if not self._decoding:
            self._decoding = True
            self._record.begin(DECODE, sum(s.max_tokens - s.made for s in running))

    def _guess(self, running: list[Sequence]) -> None:
        """What may come next of each sequence that generates: from its own context, else from the small model, for
        which nobody waits who reads a prompt."""
        drafted: list[tuple[Sequence, int]] = []
        for sequence in running:
            room = min(self.max_positions - len(sequence.tokens), sequence.max_tokens - sequence.made - 1)
            most = 0 if sequence.reading else min(self._speculate, room)
            lookup = sequence.lookup
            sequence.guesses = lookup.guess(most) if lookup is not None and most > 0 else []
            if most > 0 and not sequence.guesses:
                drafted.append((sequence, most))
        if self._drafter is None or not drafted or any(sequence.reading for sequence in running):
            return
        for sequence, _ in drafted:
            sequence.draft = sequence.draft or self._drafter.begin()
        asked = [(sequence.draft, sequence.tokens, most) for sequence, most in drafted if sequence.draft is not None]
        for (sequence, _), guesses in zip(drafted, self._drafter.guess(asked), strict=True):
            sequence.guesses = guesses

    def next_row(self, sequence: Sequence) -> Part | None:
        """The latest token of a sequence that generates, and guesses of those after it."""
        if sequence.reading or sequence.cache is None:
            return None
        tokens, drafts = sequence.tokens, sequence.guesses
        if not self._grown(sequence, len(tokens) + len(drafts)):
            return None
        return Part(sequence, len(tokens) - 1, [tokens[-1], *drafts], "all" if drafts else "last", drafts)

    def _chunks(self, running: list[Sequence]) -> Iterator[Part]:
        """The next chunk of each prompt, whole, as many as a step may have tokens of; one in any case. So where a
        prompt is cut does not depend on what else runs, and neither do its bits."""
        first, budget = True, self.capacity.step_tokens
        for sequence in running:
            if not sequence.reading or sequence.cache is None:
                continue
            start, stop = sequence.cache.length, sequence.edges[0]
            if not first and stop - start > budget:
                return
            first = False
            budget -= stop - start
            want: Want = "last" if len(sequence.edges) == 1 else "none"
            yield Part(sequence, start, sequence.tokens[start:stop], want)

    def _together(self, rows: list[Part], chunks: list[Part]) -> None:
        """Computes ``rows`` of decode and ``chunks`` of prompts; together where one plan is for both."""
        if self._rotary.depends_on_length:  # whose angles are those of one sequence at a time
            steps = [(self._decode_decoder, [part]) for part in rows]
            steps += [(self._prefill_decoder, [part]) for part in chunks]
        elif self._prefill_decoder is self._decode_decoder:
            steps = [(self._decode_decoder, [*rows, *chunks])]
        else:
            steps = [(self._decode_decoder, rows), (self._prefill_decoder, chunks)]
        steps = [(decoder, parts) for decoder, parts in steps if parts]
        several = len(rows) + len(chunks) > 1 and not self._rotary.depends_on_length
        if several and self._overlap and any(decoder.plan.remote for decoder, _ in steps):
            self._in_flights(steps, bool(chunks))
            return
        for decoder, parts in steps:
            self._prepare_angles(parts)
            self._take(parts, drive(decoder.forward(Step([part.span() for part in parts]))))

    def _in_flights(self, steps: list[tuple[Decoder, list[Part]]], reading: bool) -> None:
        """Computes ``steps``, each whole or in parts that are under way together, as is quickest."""
        parts = [part for _, several in steps for part in several]
        rows = sum(len(part.ids) for part in parts)
        flights = self._flights[reading, len(parts).bit_length(), rows.bit_length()]
        ways, began_ns = flights.choose(len(parts)), self._record.clock_ns()
        self._prepare_angles(parts)
        if ways == 1:
            logits = [drive(decoder.forward(Step([part.span() for part in mine]))) for decoder, mine in steps]
        else:
            steps = [(decoder, mine) for decoder, several in steps for mine in _shared_out(several, rows / ways)]
            logits = self._overlapped(
                [
                    (decoder, Step([part.span() for part in mine], number, Turn()))
                    for number, (decoder, mine) in enumerate(steps)
                ]
            )
        flights.took(ways, rows, (self._record.clock_ns() - began_ns) / 1e9)
        for (_, mine), found in zip(steps, logits, strict=True):
            self._take(mine, found)

    def _prepare_angles(self, parts: list[Part]) -> None:
        self._rotary.prepare(max(max(len(part.sequence.tokens), part.stop) for part in parts))

    def _read_alone(self, sequence: Sequence) -> None:
        """Reads a prompt beside which nothing runs, or as much of it as a step may have."""
        cache, edges = sequence.held, sequence.edges
        most = self.capacity.alone_tokens
        count = len(edges)
        if most is not None:
            count = max(1, sum(edge - cache.length <= most for edge in edges))
        now = edges[:count]
        expected = now[-1] - cache.length
        self._rest()
        self._record.begin(PREFILL, expected, count)
        fresh = 0
        try:
            logits = self.read(cache, sequence.tokens, now)
            fresh = expected
            want: Want = "last" if count == len(edges) else "none"
            part = Part(sequence, cache.length, sequence.tokens[cache.length : now[-1]], want)
            self._take([part], logits)
        finally:
            self._record.end(fresh, passes=1)

    def read(self, cache: KVCache, tokens: list[int], edges: list[int]) -> torch.Tensor | None:
        """Computes ``tokens`` from ``cache.length`` on in chunks that end at ``edges``; the logits after the last of
        them, (1, vocab), where they end there. ``cache`` holds them then, and its ``length`` is as it was."""
        cache.reserve(edges[-1])
        self._rotary.prepare(len(tokens))
        ids = torch.tensor(tokens, dtype=torch.int64)
        overlap = self._overlap and self._prefill_decoder.plan.remote and len(edges) > 1
        steps: list[Step] = []
        start = cache.length
        for chunk, stop in enumerate(edges):
            want: Want = "last" if stop == len(tokens) else "none"
            turn = Turn(steps[-1].turn if steps else None) if overlap else None
            steps.append(Step([Span(ids[start:stop], start, cache, want)], chunk, turn))
            start = stop
        if overlap:
            return self._overlapped([(self._prefill_decoder, step) for step in steps])[-1]
        logits = None
        for step in steps:
            logits = drive(self._prefill_decoder.forward(step))
        return logits

    def decode(self, cache: KVCache, ids: list[int]) -> torch.Tensor | None:
        """Computes ``ids`` as the rows that come after ``cache.length``, as a step of decode does; the logits of all.
        The cache's ``length`` stays."""
        stop = cache.length + len(ids)
        cache.reserve(stop)
        self._rotary.prepare(stop)
        span = Span(torch.tensor(ids, dtype=torch.int64), cache.length, cache, "all")
        return drive(self._decode_decoder.forward(Step([span])))

    @staticmethod
    def _overlapped(steps: list[tuple[Decoder, Step]]) -> list[torch.Tensor | None]:
        """The logits of each of ``steps``, all of which are under way together."""

        async def run() -> list[torch.Tensor | None]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(decoder.forward(step)) for decoder, step in steps]
            return [task.result() for task in tasks]

        try:
            return asyncio.run(run())
        except BaseExceptionGroup as group:
            # The first failure is the cause, the others are steps that it took down.
            raise _first(group) from None

    # What came of it

    def _take(self, parts: list[Part], logits: torch.Tensor | None) -> None:
        """Draws the tokens of each part in turn and hands them over."""
        row = 0
        before = sum(part.sequence.made for part in parts)
        try:
            for part in parts:
                sequence, count = part.sequence, part.logits
                sequence.held.advance(part.stop)
                sequence.edges = [edge for edge in sequence.edges if edge > part.stop]
                made = sequence.made
                if count:
                    if logits is None:
                        raise RuntimeError("a step that was to give logits gave none")
                    mine, row = logits[row : row + count], row + count
                    try:
                        more, error = self._accept_all(sequence, mine, part.drafts), None
                    except UnmetError as unmet:  # the others can go on
                        more, error = False, unmet
                    if not more:
                        self._leave(sequence, error)
                self._rows.append((sequence.number, len(part.ids), sequence.made - made))
        finally:
            made = sum(part.sequence.made for part in parts) - before
            if made:
                self._record.tokens(made)
            if self._decoding:
                self._tokens += made

    def _accept_all(self, sequence: Sequence, logits: torch.Tensor, drafts: list[int]) -> bool:
        """Draws tokens as long as ``drafts`` agree with them. True when there is more to generate."""
        more, accepted = True, 0
        for row in range(logits.shape[0]):
            more = self._accept(sequence, logits[row])
            right = row < len(drafts) and sequence.tokens[-1] == drafts[row]
            accepted += right
            if not right or not more:
                break
        sequence.held.truncate(len(sequence.tokens) - 1)
        if drafts:
            self._record.add(Speculated(len(drafts), accepted))
        return more

    def _accept(self, sequence: Sequence, logits: torch.Tensor) -> bool:
        """Draws one token and hands it over. True when there is more to generate."""
        token = sequence.sampler(logits, sequence.tokens)
        self._record.lap(TEE, "SAMPLING")
        sequence.tokens.append(token)
        if sequence.lookup is not None:
            sequence.lookup.append(token)
        done, times = sequence.done, sequence.times
        done.token_ids.append(token)
        times.latest_ns = self._record.clock_ns()
        times.first_ns = times.first_ns or times.latest_ns
        if token in sequence.end_ids or sequence.on_token(token):
            done.finish_reason = "stop"
            return False
        if sequence.made >= sequence.max_tokens or len(sequence.tokens) > self.max_positions:
            done.finish_reason = "length"
            return False
        return True

    def _rest(self) -> None:
        """Ends the phase of decode, if one is under way."""
        if self._decoding:
            self._record.end(self._tokens, self._passes)
        self._decoding = False
        self._tokens = self._passes = 0


def _place(part: Part) -> tuple[int, int]:
    """Where its keys and values lie: those of neighbours are computed together."""
    cache = part.sequence.held
    return id(cache.slab), cache.slot


def _shared_out(parts: list[Part], rows: float) -> list[list[Part]]:
    """``parts`` in their order, in groups of about ``rows`` rows."""
    groups: list[list[Part]] = [[]]
    room = rows
    for part in parts:
        if groups[-1] and room < len(part.ids) / 2:
            groups.append([])
            room += rows
        groups[-1].append(part)
        room -= len(part.ids)
    return groups


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception in a (nested) group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
