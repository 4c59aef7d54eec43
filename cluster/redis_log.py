"""The durable log of several nodes: the streams of one use case in Redis, all in one hash slot.

A transaction is one server-side script, and a script whose answer was lost is asked for again by its number, so it
takes effect once. The server must fsync before it answers, or the log is refused.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

from cluster.log import (
    FORMAT,
    LogFull,
    LogRecord,
    LogUnavailable,
    Record,
    Sequences,
    check_format,
    check_records,
    stream_key,
    trimmed_beyond_end,
)
from cluster.redis_server import Durability, NotDurable, RedisServer

_GENERATIONS = 3  # of identities, as in cluster.identities
_NAME = re.compile(r"[A-Za-z0-9_.-]+")

# KEYS: the log's entry, the writer's entry, the generations of identities, then the records of each stream.
# ARGV: number of the writer's transaction, now, remembered for, span of a generation, most kept records of a stream,
#       number of streams, their names, and for each item its stream (negative: only remember), identity, value.
# Returns the items' answers: a sequence or 0 for an append, 1 or 0 for a new or known identity.
_COMMIT = """
local log, writer = KEYS[1], KEYS[2]
local before = redis.call('HMGET', writer, 'number', 'answer')
if before[1] == ARGV[1] then return before[2] end
-- A repetition that was held up on its way, after the next transaction: nobody waits for it, and it has been done.
if before[1] and tonumber(before[1]) > tonumber(ARGV[1]) then return redis.error_reply('LATE') end

local function whole(number) return string.format('%.0f', number) end
local remember, span, most, streams = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local first = 7 + streams

local last, known, given = {}, {}, {}
for s = 1, streams do
  local name = ARGV[6 + s]
  local found = redis.call('HMGET', log, 'last:' .. name, 'trimmed:' .. name, 'known:' .. name)
  last[s], known[s] = tonumber(found[1] or 0), math.max(tonumber(found[3] or 0), tonumber(ARGV[2]))
  given[s] = last[s] - tonumber(found[2] or 0)
end
for i = first, #ARGV, 3 do
  local s = tonumber(ARGV[i])
  if s > 0 then
    given[s] = given[s] + 1
    if given[s] > most then return redis.error_reply('LOGFULL ' .. ARGV[6 + s]) end
  end
end

local now = math.max(tonumber(ARGV[2]), tonumber(redis.call('HGET', log, 'clock') or 0))
local alive, ends, active, free = {}, {}, nil, nil
for g = 0, GENERATIONS - 1 do
  local found = redis.call('HGET', log, 'generation' .. g)
  local ending, forget = string.match(found or '', '^(%d+) (%d+)$')
  if ending and now < tonumber(forget) then
    alive[#alive + 1], ends[g] = g, tonumber(ending)
    if now < ends[g] then active = g end
  else
    if ending then redis.call('UNLINK', KEYS[3 + g]) end
    free = free or g
  end
end
if not active then
  if free then
    alive[#alive + 1], active = free, free
  else  -- only after remember was shortened: then the newest generation lives on
    for g, ending in pairs(ends) do if not active or ending > ends[active] then active = g end end
  end
  local ending = (math.floor(now / span) + 1) * span
  redis.call('HSET', log, 'generation' .. active, whole(ending) .. ' ' .. whole(ending + remember))
end

local answers = {}
for i = first, #ARGV, 3 do
  local s, identity, new = tonumber(ARGV[i]), ARGV[i + 1], true
  if identity ~= '' then
    for _, g in ipairs(alive) do new = new and redis.call('SISMEMBER', KEYS[3 + g], identity) == 0 end
    if new then redis.call('SADD', KEYS[3 + active], identity) end
  end
  if s < 0 then
    answers[#answers + 1] = new and '1' or '0'
  elseif not new then
    answers[#answers + 1] = '0'
  else
    last[s] = last[s] + 1
    answers[#answers + 1] = whole(last[s])
    redis.call('XADD', KEYS[2 + GENERATIONS + s], answers[#answers] .. '-0',
      'format', 'FORMAT', 'known_at', whole(known[s]), 'value', ARGV[i + 2])
    redis.call('HSET', log, 'known:' .. ARGV[6 + s], whole(known[s]))
  end
end
for s = 1, streams do redis.call('HSET', log, 'last:' .. ARGV[6 + s], whole(last[s])) end
redis.call('HSET', log, 'clock', whole(now))
local answer = table.concat(answers, ' ')
redis.call('HSET', writer, 'number', ARGV[1], 'answer', answer)
redis.call('PEXPIRE', writer, 600000)
return answer
""".replace("GENERATIONS", str(_GENERATIONS)).replace("'FORMAT'", f"'{FORMAT}'")

# KEYS: the log's entry, the stream's records. ARGV: the stream's name, the last sequence to forget.
# Returns the stream's last sequence.
_TRIM = """
local found = redis.call('HMGET', KEYS[1], 'last:' .. ARGV[1], 'trimmed:' .. ARGV[1])
local last, trimmed, through = tonumber(found[1] or 0), tonumber(found[2] or 0), tonumber(ARGV[2])
if through <= last and through > trimmed then
  redis.call('XTRIM', KEYS[2], 'MINID', string.format('%.0f-0', through + 1))
  redis.call('HSET', KEYS[1], 'trimmed:' .. ARGV[1], ARGV[2])
end
return last
"""


class RedisLog:
    """The ``Log`` of ``name`` in the Redis server at ``url``, for processes of any node.

    A stream keeps at most ``most_pending`` records. While the server does not answer, for instance because it is
    started again, a transaction waits up to ``patience_s`` seconds before it raises ``LogUnavailable``. Identities are
    kept in the server's memory, some 70 bytes each.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        remember_us: int,
        most_pending: int = 1_000_000,
        patience_s: float = 10.0,
        durability: Durability = "checked",
    ) -> None:
        """Raises ``LogUnavailable`` when the server may lose what it acknowledges, as later calls do."""
        if remember_us <= 0:
            raise ValueError(f"remember_us must be positive, not {remember_us}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of a log is made of letters, digits, '_', '.' and '-', not {name!r}")
        self.remember_us = remember_us
        self._most_pending = most_pending
        self._patience_s = patience_s
        self._server = RedisServer(url, durability=durability)
        self._slot = f"{{tidegate:{name}}}:log".encode()
        self.where = f"{self._server.where} {self._slot.decode()}"
        self._commit = self._server.script(_COMMIT)
        self._trim = self._server.script(_TRIM)
        self._writer = b"%b:writer:%b" % (self._slot, secrets.token_hex(8).encode())
        self._number = 0
        self._one_at_a_time = threading.Lock()
        with self._asking():
            self._server.client.hsetnx(self._entry, "format", FORMAT)
            check_format(int(self._server.client.hget(self._entry, "format") or 0), f"the log {self.where}")

    @contextmanager
    def transaction(self, now_us: int) -> Iterator[RedisTransaction]:
        """See ``Log``; nothing is sent before the block has ended."""
        transaction = RedisTransaction()
        yield transaction
        self._send(transaction, now_us)

    def read(self, stream: str, after: int, limit: int | None = None) -> list[LogRecord]:
        """See ``Log``."""
        if limit is not None and limit <= 0:
            return []
        with self._asking():
            entries: Any = self._server.client.xrange(self._records(stream), f"{after + 1}-0", "+", limit)
        found = []
        for key, fields in entries:
            sequence = int(key.partition(b"-")[0])
            check_format(int(fields[b"format"]), f"record {sequence} of stream {stream!r} in {self.where}")
            found.append(LogRecord(sequence, int(fields[b"known_at"]), fields[b"value"]))
        return found

    def last(self, stream: str) -> int:
        """See ``Log``."""
        return self._look(stream)[0]

    def first(self, stream: str) -> int:
        """See ``Log``."""
        return self._look(stream)[1] + 1

    def pending(self, stream: str) -> int:
        """See ``Log``."""
        last, trimmed = self._look(stream)
        return last - trimmed

    def trim(self, stream: str, through: int) -> None:
        """See ``Log``."""
        with self._asking():
            last = self._trim([self._entry, self._records(stream)], [stream, through])
        if through > last:
            raise trimmed_beyond_end(stream, last, through)

    def close(self) -> None:
        """See ``Log``."""
        self._server.close()

    @property
    def _entry(self) -> bytes:
        return self._slot + b":entry"

    def _records(self, stream: str) -> bytes:
        return self._slot + b":records:" + stream_key(stream)

    def _look(self, stream: str) -> tuple[int, int]:
        """The stream's last and last trimmed sequence."""
        with self._asking():
            last, trimmed = self._server.client.hmget(self._entry, f"last:{stream}", f"trimmed:{stream}")
        return int(last or 0), int(trimmed or 0)

    def _send(self, transaction: RedisTransaction, now_us: int) -> None:
        streams = transaction.streams
        keys = [self._entry, self._writer]
        keys += [b"%b:identities:%d" % (self._slot, generation) for generation in range(_GENERATIONS)]
        keys += [self._records(stream) for stream in streams]
        span_us = -(-self.remember_us // (_GENERATIONS - 1))
        header = [now_us, self.remember_us, span_us, self._most_pending, len(streams), *streams]
        with self._one_at_a_time, self._asking():
            self._number += 1
            arguments = [self._number, *header, *transaction.items]
            answer = self._server.patiently(lambda: self._commit(keys, arguments), self._patience_s)
        transaction.fill_in(answer)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except redis.OutOfMemoryError:
            raise LogFull(
                f"the server of the log {self.where} has used its maxmemory: let the log drain, or give it more"
            ) from None
        except NotDurable as error:
            raise LogUnavailable(str(error)) from None
        except redis.RedisError as error:
            reason = str(error)
            if not reason.startswith("LOGFULL "):
                raise LogUnavailable(f"the log {self.where} does not answer: {reason}") from error
            raise LogFull(
                f"stream {reason.removeprefix('LOGFULL ')!r} of the log {self.where} may keep {self._most_pending} "
                "records: let it drain"
            ) from None


class RedisTransaction:
    """The ``LogTransaction`` of Redis."""

    def __init__(self) -> None:
        self.streams: dict[str, int] = {}
        self.items: list[Any] = []
        self._answers: list[tuple[list[Any], int, bool]] = []  # to fill in, how many, of an append

    def append(self, stream: str, records: Sequence[Record]) -> Sequences:
        """See ``LogTransaction``."""
        check_records(stream, records)
        place = self._place(stream)
        for record in records:
            identity = b"" if record.identity is None else _digest(stream, record.identity)
            self.items += (place, identity, record.value)
        answers: Sequences = []
        self._answers.append((answers, len(records), True))
        return answers

    def remember(self, stream: str, identities: Sequence[bytes]) -> list[bool]:
        """See ``LogTransaction``."""
        place = self._place(stream)
        for identity in identities:
            self.items += (-place, _digest(stream, identity), b"")
        answers: list[bool] = []
        self._answers.append((answers, len(identities), False))
        return answers

    def fill_in(self, answer: bytes) -> None:
        """Hands the script's answer to those who asked."""
        numbers = iter(map(int, answer.split()))
        for answers, count, appended in self._answers:
            taken = [next(numbers) for _ in range(count)]
            answers += [number or None for number in taken] if appended else [number == 1 for number in taken]

    def _place(self, stream: str) -> int:
        return self.streams.setdefault(stream, len(self.streams) + 1)


def _digest(stream: str, identity: bytes) -> bytes:
    # 128 bits of BLAKE2b: members of one size, and nobody can make two identities collide.
    name = stream.encode()
    return hashlib.blake2b(b"%d:%b%b" % (len(name), name, identity), digest_size=16).digest()
