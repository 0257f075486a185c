"""TDX and SGX: quotes as Intel's processors sign them, verified by dcap-qvl.

dcap-qvl checks the chain from Intel's root to the quote, revocation, expiry and debug. What it calls claims is judged
by the policy."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

from teegpu.attest.claims import Claims
from teegpu.attest.evidence import SGX, TDX, Collateral
from teegpu.errors import UsageError, refusal

STATUSES: Final = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
)
"""Intel's judgements of a processor's firmware that a policy may accept. ``Revoked`` is none of them."""

_HEADER_BYTES: Final = 48
_BODY_BYTES: Final = {3: 384, 4: 584}
_V5_BODIES: Final = {2: 584, 3: 648, 4: 885}
_TDX_TEE_TYPE: Final = 0x81


def verify(kind: str, quote: bytes, collateral: Collateral, now: int, root: bytes | None = None) -> Claims:
    """What ``quote`` proves at ``now`` (Unix time). ``root`` (DER) stands in for Intel's. Raises ``AttestationError``,
    and ``UsageError`` where dcap-qvl is not installed."""
    qvl = dcap_qvl()
    found = _tee_type(quote)
    if found != kind:
        raise refusal("kind", f"the quote is of {found}, and the evidence says that it is of {kind}")
    _check_length(quote)
    _check_debug(kind, quote)
    if not collateral.intel:
        raise refusal(
            "collateral",
            "there is nothing from Intel to check the quote with: get it with 'teegpu attest collateral' and give it "
            "with --collateral",
        )
    try:
        given = qvl.QuoteCollateralV3.from_json(json.dumps(dict(collateral.intel)))
        verifier = qvl.QuoteVerifier() if root is None else qvl.QuoteVerifier(root)
        raw = verifier.verify_with_policy(quote, given, now, qvl.QuotePolicy.claims_only(now)).to_json()
    except BaseException as error:  # noqa: BLE001 (told as a refusal, or raised again)
        raise _refusal(error) from None
    return _claims(kind, json.loads(raw), _collateral_at(collateral))


def dcap_qvl() -> Any:
    """dcap-qvl. Raises ``UsageError`` where it is missing."""
    try:
        import dcap_qvl as found
    except ImportError:
        raise UsageError(
            "evidence of TDX and SGX is verified with dcap-qvl, which is not installed: pip install 'teegpu[attest]'"
        ) from None
    return found


def _tee_type(quote: bytes) -> str:
    if len(quote) < _HEADER_BYTES + 384:
        raise refusal("quote", f"a quote of {len(quote)} bytes is too short to be one")
    found = int.from_bytes(quote[4:8], "little")
    if found not in (0, _TDX_TEE_TYPE):
        raise refusal("quote", f"a quote of a kind of TEE that is not known ({found:#x})")
    return TDX if found == _TDX_TEE_TYPE else SGX


def _body(quote: bytes) -> tuple[int, int]:
    """Where the report begins in ``quote``, and where it ends."""
    version = int.from_bytes(quote[:2], "little")
    if version == 5:
        body, start = _V5_BODIES.get(int.from_bytes(quote[48:50], "little")), _HEADER_BYTES + 6
    else:
        body, start = _BODY_BYTES.get(version), _HEADER_BYTES
    if body is None:
        raise refusal("quote", f"a quote of a version or body that is not known (version {version})")
    return start, start + body


def _check_length(quote: bytes) -> None:
    """A quote ends where it says; some services hand it out with zeros behind."""
    _, end = _body(quote)
    end += 4 + int.from_bytes(quote[end : end + 4], "little")
    if end > len(quote) or any(quote[end:]):
        raise refusal("quote", f"the quote has {len(quote)} bytes, and says that it has {end}")


def _check_debug(kind: str, quote: bytes) -> None:
    """dcap-qvl refuses debug as well, after all else: who has it on should read that first."""
    start, _ = _body(quote)
    debug = quote[start + 48] & 2 if kind == SGX else quote[start + 120] & 1
    if debug:
        raise refusal("debug", "the TEE runs in debug mode: its host reads its memory")


def _refusal(error: BaseException) -> BaseException:
    """A quote is its maker's: what the library says of one, panics included, is a refusal."""
    if isinstance(error, (ValueError, OverflowError, TypeError)):
        reason = " ".join(part.strip() for part in str(error).splitlines() if part.strip() not in ("", "Caused by:"))
        return refusal("quote", f"the quote is not genuine, or not any more: {reason[:300]}")
    if type(error).__name__ == "PanicException":
        return refusal("quote", "the quote can't be read")
    return error


def _claims(kind: str, raw: dict[str, Any], collateral_at: int) -> Claims:
    (report,) = raw["report"].values()
    while "base" in report:  # later reports hold the earlier ones
        report = {**report.pop("base"), **report}
    if kind == TDX:
        names = {"mrtd": "mr_td", **{f"rtmr{number}": f"rt_mr{number}" for number in range(4)}}
        numbers: dict[str, int] = {}
    else:
        names = {"mrenclave": "mr_enclave", "mrsigner": "mr_signer"}
        numbers = {"isv_prod_id": report["isv_prod_id"], "isv_svn": report["isv_svn"]}
    return Claims(
        kind=kind,
        report_data=bytes.fromhex(report["report_data"]),
        measurements={name: report[theirs] for name, theirs in names.items()},
        numbers=numbers,
        tcb_status=raw["tcb"]["status"],
        tcb_at=raw["platform"]["tcb_date_tag"],
        advisories=tuple(raw["tcb"]["advisory_ids"]),
        platform=bytes(raw["platform"]["pck"]["ppid"]).hex(),
        collateral_at=collateral_at,
    )


def _collateral_at(collateral: Collateral) -> int:
    """When the oldest of what Intel says anew each month was said. The list of its root is made once a year, and is
    good as long as it says so, which dcap-qvl has checked of all parts."""
    from cryptography import x509

    parts = collateral.intel
    ages = [datetime.fromisoformat(json.loads(parts[name])["issueDate"]) for name in ("tcb_info", "qe_identity")]
    ages.append(x509.load_der_x509_crl(bytes.fromhex(parts["pck_crl"])).last_update_utc)
    return int(min(ages).timestamp())
