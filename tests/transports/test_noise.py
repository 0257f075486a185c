"""The key exchange and its ciphers: the published vector, and everything that must not be taken for right."""

from __future__ import annotations

import os
import threading

import pytest

from transports import noise
from transports.errors import SealError
from transports.noise import Cipher, Initiator, Responder

PROLOGUE = b"for tests"

# Noise_IK_25519_AESGCM_SHA256 of the vectors of cacophony, which noise-c and snow are tested with too.
VECTOR_PROLOGUE = bytes.fromhex("4a6f686e2047616c74")
CLIENT, CLIENT_ONCE, SERVER, SERVER_ONCE = (
    bytes.fromhex(text)
    for text in (
        "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1",
        "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a",
        "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893",
        "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b",
    )
)
VECTOR = [
    (bytes.fromhex(payload), bytes.fromhex(sealed))
    for payload, sealed in (
        (
            "4c756477696720766f6e204d69736573",
            "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c79444e417bc55c7a8166c993356c1be41ef67818a292"
            "426f301556c7f26b21d25ddb097153891a9a956cff47b83e63ad8d701c1342c209cff1ca5ecd43402762ac249e3bd3a4c0a145fe"
            "07cb5dae28ea13a3",
        ),
        (
            "4d757272617920526f746862617264",
            "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843af2ccf9972e22afc67aeafcd25162f7f98c363b7"
            "762e3e4cb7d272e39f27a5",
        ),
        ("462e20412e20486179656b", "66acfc92e3197de166809e6d4d5d003dcc819a84bc3522ca53c9d9"),
        ("4361726c204d656e676572", "71f89aa6533a6de70b0826864dd75f60806ee40170c16290189eb3"),
        (
            "4a65616e2d426170746973746520536179",
            "4795a3423550c8bf00386bd496a3e2c76c10669d2a75ab8f79b5094c5412a25705",
        ),
        (
            "457567656e2042f6686d20766f6e2042617765726b",
            "aa0bb39097555c918e40be82abc2b909eb79d9eb87adb07e268fc37323a6cf904fd01fb391",
        ),
    )
]
HANDSHAKE_HASH = bytes.fromhex("669c8640d9e42a3cda2f232f78597ceefb01daa6e3df81181ccce6fc6b5026bf")


def pair() -> tuple[bytes, bytes]:
    secret = noise.new_secret()
    return secret, noise.public_of(secret)


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def begun() -> tuple[Initiator, Responder, bytes]:
    (client, _), (server, public) = pair(), pair()
    initiator, responder = Initiator(client, public, PROLOGUE), Responder(server, PROLOGUE)
    return initiator, responder, initiator.write()


def test_the_published_vector() -> None:
    initiator = Initiator(CLIENT, noise.public_of(SERVER), VECTOR_PROLOGUE, ephemeral=CLIENT_ONCE)
    responder = Responder(SERVER, VECTOR_PROLOGUE, ephemeral=SERVER_ONCE)
    (first, sealed_first), (second, sealed_second), *transport = VECTOR
    message = initiator.write(first)
    assert message == sealed_first
    assert responder.read(message) == first
    assert responder.client == noise.public_of(CLIENT)
    message, server_sends, server_receives = responder.write(second)
    assert message == sealed_second
    payload, client_sends, client_receives = initiator.read(message)
    assert payload == second
    assert (client_sends, client_receives) == (server_receives, server_sends)
    assert initiator.hash == responder.hash == HANDSHAKE_HASH
    ways = [Cipher(client_sends), Cipher(server_sends)]
    back = [Cipher(server_receives), Cipher(client_receives)]
    for number, (payload, sealed) in enumerate(transport):
        assert ways[number % 2].seal(payload) == sealed
        assert bytes(back[number % 2].open(view(sealed))) == payload


def test_messages_have_the_lengths_that_are_asked_for() -> None:
    _, responder, first = begun()
    assert len(first) == noise.FIRST_BYTES
    responder.read(first)
    assert len(responder.write()[0]) == noise.SECOND_BYTES


@pytest.mark.parametrize("at", range(0, noise.FIRST_BYTES, 5))
def test_a_bit_of_the_first_message(at: int) -> None:
    _, responder, first = begun()
    spoilt = bytearray(first)
    spoilt[at] ^= 1
    with pytest.raises(SealError):
        responder.read(bytes(spoilt))
    assert responder.client == b""


@pytest.mark.parametrize("at", range(0, noise.SECOND_BYTES, 5))
def test_a_bit_of_the_second_message(at: int) -> None:
    initiator, responder, first = begun()
    responder.read(first)
    spoilt = bytearray(responder.write()[0])
    spoilt[at] ^= 1
    with pytest.raises(SealError):
        initiator.read(bytes(spoilt))


@pytest.mark.parametrize("length", [0, 1, 31, 32, 80, 95, 97, 255])
def test_a_first_message_of_another_length(length: int) -> None:
    _, responder, first = begun()
    with pytest.raises(SealError):
        responder.read((first + bytes(255))[:length])


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
def test_a_point_of_small_order_is_no_key(point: bytes) -> None:
    """What is agreed upon with one is known to all."""
    initiator, responder, first = begun()
    with pytest.raises(SealError):
        responder.read(point + first[32:])
    with pytest.raises(SealError):
        initiator.read(point + bytes(16))
    with pytest.raises(SealError):
        Initiator(noise.new_secret(), point, PROLOGUE).write()


def test_who_says_another_prologue() -> None:
    secret, public = pair()
    first = Initiator(noise.new_secret(), public, b"of another release").write()
    with pytest.raises(SealError):
        Responder(secret, PROLOGUE).read(first)


def test_the_answer_to_another_first_message() -> None:
    """A recorded one, or that of another connection of the same client to the same server."""
    (client, _), (server, public) = pair(), pair()
    ours, other = Initiator(client, public, PROLOGUE), Initiator(client, public, PROLOGUE)
    responder = Responder(server, PROLOGUE)
    responder.read(other.write())
    ours.write()
    with pytest.raises(SealError):
        ours.read(responder.write()[0])


def test_who_has_both_lasting_keys_later_reads_nothing() -> None:
    """Forward secrecy: all that crossed the link was recorded, and both secret keys are stolen afterwards."""
    (client, _), (server, public) = pair(), pair()
    initiator, responder = Initiator(client, public, PROLOGUE), Responder(server, PROLOGUE)
    first = initiator.write()
    responder.read(first)
    second, *_ = responder.write()
    _, sending, _ = initiator.read(second)
    sealed = Cipher(sending).seal(b"the moon has phases")

    thief = Responder(server, PROLOGUE)
    thief.read(first)  # that much can be read: whose it is
    _, _, as_server = thief.write()
    with pytest.raises(SealError):
        Cipher(as_server).open(view(sealed))
    thief = Initiator(client, public, PROLOGUE)
    thief.write()
    with pytest.raises(SealError):
        thief.read(second)


def test_who_has_the_client_s_key_is_not_taken_for_the_server() -> None:
    """Key-compromise impersonation, of the server to a client whose key was stolen."""
    (client, _), (_, public) = pair(), pair()
    first = Initiator(client, public, PROLOGUE).write()
    with pytest.raises(SealError):
        Responder(client, PROLOGUE).read(first)
    with pytest.raises(SealError):
        Responder(noise.new_secret(), PROLOGUE).read(first)


class Forger(Initiator):
    """Who has the server's key and not the client's, and begins in its name: what both lasting keys make can be made
    with either."""

    def __init__(self, server: bytes, client_public: bytes) -> None:
        super().__init__(noise.new_secret(), noise.public_of(server), PROLOGUE)
        self._stolen, self._client_public = server, client_public

    def write(self, payload: bytes = b"") -> bytes:
        public = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(public)
        self._mix_key(self._ephemeral, self._server)
        own = self._encrypt_and_hash(self._client_public)
        self._mix_key(noise.X25519PrivateKey.from_private_bytes(self._stolen), self._client_public)
        return public + own + self._encrypt_and_hash(payload)


def test_who_has_the_server_s_key_gets_no_further_than_the_first_message_in_a_client_s_name() -> None:
    """Why nothing that is asked counts before something sealed has come."""
    (_, client_public), (server, _) = pair(), pair()
    forger, responder = Forger(server, client_public), Responder(server, PROLOGUE)
    responder.read(forger.write())
    assert responder.client == client_public
    with pytest.raises(SealError):
        forger.read(responder.write()[0])


# ---- ciphers


def ways(**options: int) -> tuple[Cipher, Cipher]:
    key = os.urandom(32)
    return Cipher(key, **options), Cipher(key, **options)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 65536, 2**20 + 3])
def test_what_is_sealed_is_opened_in_its_place(size: int) -> None:
    sealing, opening = ways()
    data = os.urandom(size)
    room = bytearray(size + noise.TAG_BYTES)
    for sealed in (view(sealing.seal(data)), memoryview(room)):
        if sealed.obj is room:
            sealing.seal_into(data, sealed)
        opened = opening.open(sealed)
        assert bytes(opened) == data
        assert bytes(sealed[:size]) == data


def test_after_a_failure_nothing_is_opened() -> None:
    sealing, opening = ways()
    first, second = sealing.seal(b"one"), sealing.seal(b"two")
    with pytest.raises(SealError):
        opening.open(view(second))
    for _ in range(2):
        with pytest.raises(SealError, match="something before it"):
            opening.open(view(first))


def test_the_last_number_is_not_used() -> None:
    """Rekeying has it. One before it is the last, on both sides."""
    sealing, opening = ways(nonce=2**64 - 3)
    for text in (b"one", b"two"):
        assert bytes(opening.open(view(sealing.seal(text)))) == text
    for _ in range(2):
        with pytest.raises(SealError, match="all numbers of this connection are used up"):
            sealing.seal(b"three")
    with pytest.raises(SealError, match="all numbers of this connection are used up"):
        opening.open(view(bytes(32)))


def test_keys_are_renewed_on_both_sides_at_once() -> None:
    sealing, opening = ways(rekey_bytes=100)
    key = sealing._aes
    keys = {id(key)}
    kept = [key]
    for number in range(20):
        data = os.urandom(7 * number)  # one of more than 100 bytes has a key of its own
        assert bytes(opening.open(view(sealing.seal(data)))) == data
        kept.append(sealing._aes)
        keys.add(id(sealing._aes))
    assert len(keys) >= 10


def test_the_renewed_key_is_that_of_the_specification() -> None:
    """REKEY(k): the first 32 bytes of ENCRYPT(k, 2^64 - 1, nothing, 32 zeros)."""
    key = os.urandom(32)
    sealing = Cipher(key, rekey_bytes=10)
    sealing.seal(bytes(10))
    sealed = sealing.seal(b"next")
    renewed = noise.AESGCM(key).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]
    assert noise.AESGCM(renewed).decrypt(bytes(11) + b"\x01", sealed, None) == b"next"


def test_a_fork_seals_nothing() -> None:
    sealing, opening = ways()
    child = os.fork()
    if not child:
        code = 1
        try:
            sealing.seal(b"the same number again")
        except SealError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(opening.open(view(sealing.seal(b"goes on")))) == b"goes on"


def test_a_fork_in_the_middle_of_the_exchange_gets_no_keys() -> None:
    """Both would seal with the same ones, and the same numbers."""
    initiator, responder, first = begun()
    responder.read(first)
    child = os.fork()
    if not child:
        code = 1
        try:
            responder.write()
        except SealError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    initiator.read(responder.write()[0])


def test_a_fork_with_its_parent_s_number_seals_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where both are number 1."""
    number = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: number)
    test_a_fork_seals_nothing()


def test_more_than_a_seal_holds_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library ends the process for 2 GiB, whoever sent them."""
    assert noise.MAX_DATA_BYTES + noise.TAG_BYTES < 2**31
    monkeypatch.setattr(noise, "MAX_DATA_BYTES", 1000)
    sealing, opening = ways()
    with pytest.raises(SealError):
        sealing.seal(bytes(1001))
    assert len(opening.open(view(sealing.seal(bytes(1000))))) == 1000
    with pytest.raises(SealError):
        opening.open(view(bytes(1017)))


def test_threads_never_use_a_number_twice() -> None:
    sealing, _ = ways()
    sealed: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: sealed.extend(sealing.seal(bytes(8)) for _ in range(500))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(sealed)) == 2000  # the same plaintext each time: the number alone tells them apart
