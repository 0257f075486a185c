"""``teegpu attest`` and ``teegpu connect``, as their user meets them."""

from __future__ import annotations

import http.server
import json
import signal
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teegpu.attest import amd, evidence
from teegpu.attest.binding import ENDPOINT, Binding
from teegpu.attest.evidence import SGX, SNP, TDX, Evidence
from teegpu.attest.policy import Policy
from teegpu.attest.simulated import quote as simulated_quote
from teegpu.attest.verify import claims_of
from tests.conftest import TinyModel
from tests.teegpu.attest import pki
from tests.teegpu.attest.test_verify import BINDING, SAMPLES, SETTINGS, make
from tests.teegpu.cli.conftest import Start, Teegpu
from tests.teegpu.connect.conftest import Stranger, nonce_of
from tests.teegpu.connect.conftest import http as reply


def written(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_nothing_is_attested_here(teegpu: Teegpu) -> None:
    shown = teegpu("attest", "show")
    assert shown.code == 12
    assert "nothing can be attested here: none: development mode" in shown.err


def test_evidence_is_shown_and_verified(teegpu: Teegpu, tmp_path: Path) -> None:
    assert teegpu("keys", "new", "gpu").code == 0
    out = tmp_path / "e.json"
    shown = teegpu("attest", "show", "--simulated", "--key", "gpu", "--nonce", "ab" * 16, "--out", out)
    assert shown.code == 0
    assert "a simulation, which proves nothing" in shown.err
    verified = teegpu("attest", "verify", out)
    assert verified.code == 0
    assert verified.out.startswith("genuine: simulated, as of ")
    assert "speaks for: a gpu-server with the key" in verified.out
    assert f"asked with: {'ab' * 16}" in verified.out
    document = json.loads(out.read_text())
    document["binding"]["nonce"] = "cd" * 16
    changed = teegpu("attest", "verify", written(out, document))
    assert (changed.code, "rule 'binding'" in changed.err) == (12, True)
    assert teegpu("attest", "verify", tmp_path / "none").code == 2
    assert teegpu("attest", "verify", written(out, {})).code == 12


def test_a_real_quote_of_intel_is_verified(teegpu: Teegpu, tmp_path: Path) -> None:
    said = json.loads((SAMPLES / "tdx_quote_collateral.json").read_text())
    given = written(tmp_path / "collateral.json", {"intel": said, "amd": {}})
    command = ["attest", "verify", SAMPLES / "tdx_quote", "--kind", "tdx", "--collateral", given]
    verified = teegpu(*command, "--at", "2025-07-01T00:00:00Z")
    assert verified.code == 0
    assert "mrtd: 91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27" in verified.out
    assert "firmware: UpToDate, a level of 2024-03-13" in verified.out
    assert "speaks for: nothing that is known, it is a quote alone" in verified.out
    late = teegpu(*command)
    assert (late.code, "rule 'quote'" in late.err, "xpired" in late.err) == (12, True, True)
    assert teegpu(*command, "--at", "yesterday").code == 2


def test_a_policy_s_refusals_are_all_told(teegpu: Teegpu, tmp_path: Path) -> None:
    case = make("simulated")
    file = written(tmp_path / "e.json", case.evidence().to_json())
    policy = tmp_path / "p.toml"
    assert teegpu("attest", "policy", "new", "--kind", "simulated", "--out", policy).code == 0
    text = policy.read_text().replace('measurement = ["FILL-IN"]', f'measurement = ["{"0" * 96}"]')
    text = text.replace('model = ["FILL-IN"]', f'model = ["{"0" * 64}"]').replace("FILL-IN", "0")
    policy.write_text(text)
    judged = teegpu("attest", "verify", file, "--policy", policy)
    assert judged.code == 12
    for rule in ("simulated.measurement", "settings.model", "settings.version"):
        assert f"refused by rule '{rule}'" in judged.err
    assert judged.err.rstrip().splitlines()[-1].startswith("teegpu: refused by rule 'simulated.measurement'")


@pytest.mark.parametrize(
    "args",
    [
        ["policy", "new"],
        ["policy", "new", "--kind", "tdx", "--from", "https://h"],
        ["policy", "new", "--kind", "nitro"],
        ["policy", "new", "--from", "http://h"],
        ["verify", "x", "--kind", "nitro"],
        ["show", "--simulated", "--key", "nobody"],
    ],
)
def test_mistakes_are_told_in_a_line(args: list[str], teegpu: Teegpu) -> None:
    told = teegpu("attest", *args)
    assert (told.code, told.err.count("\n"), "Traceback" in told.err) == (2, 1, False)


def test_connect_needs_a_policy_that_it_can_read(teegpu: Teegpu, tmp_path: Path) -> None:
    assert "--policy FILE" in teegpu("connect", "https://127.0.0.1:1").err
    bad = tmp_path / "p.toml"
    bad.write_text("kinds = []\n")
    assert teegpu("connect", "https://127.0.0.1:1", "--policy", bad).code == 2
    assert teegpu("connect", "https://127.0.0.1:1", "--policy", tmp_path / "none").code == 2


def simulated_endpoint() -> Stranger:
    def answer(path: str) -> bytes:
        if not path.startswith("/v1/attestation"):
            return reply({"path": path})
        binding = Binding(ENDPOINT, made.own.key, nonce_of(path), SETTINGS)
        return reply(Evidence("simulated", simulated_quote(binding.report_data), binding).to_json())

    made = Stranger(answer)
    return made


def test_a_policy_from_an_endpoint_and_the_proxy_by_it(start: Start, teegpu: Teegpu, tmp_path: Path) -> None:
    endpoint = simulated_endpoint()
    policy = tmp_path / "p.toml"
    seen = teegpu("attest", "policy", "new", "--from", endpoint.url, "--out", policy)
    assert (seen.code, "not what should be" in seen.err) == (0, True)
    assert Policy.read(policy).rules["settings"]["model"] == ("ab" * 32,)
    with start("connect", endpoint.url, "--policy", policy, "--listen", "127.0.0.1:0") as process:
        lines = [process.line() for _ in range(5)]
        assert "verified: privacy two-server, verify on" in "".join(lines)
        assert "simulated, which proves nothing" in lines[3]
        where = lines[4].split()[4]
        with urllib.request.urlopen(where + "/v1/models?x=1", timeout=20) as answer:
            assert json.loads(answer.read()) == {"path": "/v1/models?x=1"}
            assert answer.headers["x-teegpu-verified"].startswith("simulated; key=")
        process.send_signal(signal.SIGTERM)
        assert process.finish().code == 0
    refusing = teegpu("connect", endpoint.url, "--policy", written_other(policy), "--listen", "127.0.0.1:0")
    assert (refusing.code, "rule 'settings.privacy'" in refusing.err) == (12, True)
    endpoint.close()


def test_the_demonstration_of_the_docs(start: Start, teegpu: Teegpu, tiny_model: TinyModel, tmp_path: Path) -> None:
    """An endpoint, a policy of what it shows, the proxy, and OpenAI's client; then a rule that it breaks."""
    import openai

    policy = tmp_path / "demo.toml"
    free = ("--listen", "127.0.0.1:0")
    given = ("--attest", "simulated", "--plan", "local", "--metrics-listen", "", "--threads", 1)
    model = tiny_model("llama")
    endpoint = start("api", *given, *free, "--model", model.path)
    url = next(line for line in iter(endpoint.line, "") if "ready at https://" in line).split()[-1]
    assert next(line for line in iter(endpoint.line, "") if "attested" in line).startswith("attested: SIMULATED")
    assert teegpu("attest", "policy", "new", "--from", url, "--out", policy).code == 0

    proxy = start("connect", url, "--policy", policy, *free)
    lines = [proxy.line() for _ in range(5)]
    assert lines[1].startswith("verified: privacy local, verify on, model ")
    with openai.OpenAI(base_url=lines[4].split()[4] + "/v1", api_key="none", max_retries=0) as client:
        made = client.completions.with_raw_response.create(model=model.path.name, prompt="abc", max_tokens=4)
    assert made.headers["x-teegpu-verified"].startswith("simulated; key=")
    assert made.parse().usage
    policy.write_text(policy.read_text().replace('privacy = ["local"]', 'privacy = ["two-server"]'))
    refused = teegpu("connect", url, "--policy", policy, *free)
    assert (refused.code, refused.err) == (
        12,
        "teegpu: refused by rule 'settings.privacy': it runs with privacy local, and the policy accepts two-server\n",
    )
    for process in (proxy, endpoint):
        process.send_signal(signal.SIGTERM)
        assert process.finish().code == 0


def written_other(policy: Path) -> Path:
    other = policy.with_name("other.toml")
    other.write_text(policy.read_text().replace('privacy = ["two-server"]', 'privacy = ["pads"]'))
    return other


def test_insecure_is_said_at_the_start(start: Start) -> None:
    endpoint = Stranger(lambda path: reply({}, "404 Not Found"))
    with start("connect", endpoint.url, "--insecure", "--listen", "127.0.0.1:0") as process:
        lines = [process.line() for _ in range(3)]
        assert lines[0].startswith("warning: --insecure: requests go to the endpoint whatever it proves")
        assert lines[1].startswith("NOT VERIFIED: refused by rule 'evidence'")
        where = lines[2].split()[4]
        with pytest.raises(urllib.request.HTTPError) as caught:
            urllib.request.urlopen(where + "/x", timeout=20)
        assert "rule 'evidence'" in caught.value.headers["x-teegpu-insecure"]
        caught.value.close()
        process.send_signal(signal.SIGINT)
        assert process.finish().code in (0, 130)
    endpoint.close()


@contextmanager
def vendor(answers: dict[str, tuple[bytes, dict[str, str]]]) -> Iterator[str]:
    """A service that answers paths by how they begin."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = next((given for path, given in answers.items() if self.path.startswith(path)), None)
            self.send_response(200 if found else 404)
            for name, value in (found[1] if found else {}).items():
                self.send_header(name, urllib.parse.quote(value))
            self.end_headers()
            self.wfile.write(found[0] if found else b"")

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{service.server_port}"
        finally:
            service.shutdown()
            thread.join()


@pytest.mark.parametrize("kind", [TDX, SGX])
def test_collateral_of_intel(kind: str, teegpu: Teegpu, tmp_path: Path) -> None:
    case = make(kind)
    said = case.collateral.intel
    base = f"/{kind}/certification/v4"
    answers = {
        "/sgx/certification/v4/pckcrl": (
            bytes.fromhex(said["pck_crl"]),
            {"SGX-PCK-CRL-Issuer-Chain": said["pck_crl_issuer_chain"]},
        ),
        "/sgx/certification/v4/rootcacrl": (said["root_ca_crl"].encode(), {}),
        f"{base}/tcb": (
            f'{{"tcbInfo":{said["tcb_info"]},"signature":"{said["tcb_info_signature"]}"}}'.encode(),
            {"TCB-Info-Issuer-Chain": said["tcb_info_issuer_chain"]},
        ),
        f"{base}/qe/identity": (
            f'{{"enclaveIdentity":{said["qe_identity"]},"signature":"{said["qe_identity_signature"]}"}}'.encode(),
            {"SGX-Enclave-Identity-Issuer-Chain": said["qe_identity_issuer_chain"]},
        ),
    }
    bare = Evidence(kind, case.evidence().quote, BINDING)
    file, out = written(tmp_path / "e.json", bare.to_json()), tmp_path / "c.json"
    with vendor(answers) as url:
        got = teegpu("attest", "collateral", file, "--url", url, "--out", out)
    assert got.code == 0, got.err
    found = evidence.Collateral.from_json(json.loads(out.read_text()))
    assert found.intel["pck_crl"] == said["pck_crl"]
    assert found.intel["tcb_info_issuer_chain"] == said["tcb_info_issuer_chain"]
    with vendor({}) as url:
        nothing = teegpu("attest", "collateral", file, "--url", url)
    assert (nothing.code, nothing.err.count("\n")) == (4, 1)


def test_collateral_of_amd(teegpu: Teegpu, tmp_path: Path) -> None:
    made, case = pki.amd_vendor(), make(SNP)
    listed = case.collateral.amd
    chip = pki.CHIP.hex()
    answers = {
        f"/vcek/v1/Genoa/{chip}?blSPL=3&teeSPL=0&snpSPL=20&ucodeSPL=209": (listed["vcek"], {}),
        "/vcek/v1/Genoa/cert_chain": (pki.pem(made.ask, made.ark).encode(), {}),
        "/vcek/v1/Genoa/crl": (listed["crl"], {}),
    }
    bare = Evidence(SNP, case.evidence().quote, BINDING)
    file, out = written(tmp_path / "e.json", bare.to_json()), tmp_path / "c.json"
    with vendor(answers) as url:
        assert teegpu("attest", "collateral", file, "--url", url, "--out", out).code == 0
    found = evidence.Collateral.from_json(json.loads(out.read_text()))
    assert claims_of(SNP, bare.quote, found, pki.NOW, case.roots).platform == chip
    assert set(amd.ROOTS.values()) == {"Milan", "Genoa"}
    with vendor({}) as url:
        assert teegpu("attest", "collateral", file, "--url", url).code == 4
