"""What an audit found: a table, the best setting, one sentence of advice."""

from statistics import NormalDist

from keras_ebft.evaluation.audit.qualities import QUALITIES

TITLES = {"share": "true tokens", "prefix": "true prefix", "last": "last token"}
# Beyond these shares of blocks there is hardly anything to learn from.
MOSTLY = 0.9
# Fewer documents than this, or blocks that tell anything, make rough intervals.
FEW = 10
SETTING_COLUMNS = ("layers", "mode", "pooling", "whitening")


class AuditResult:
    """The outcome of a `RewardAudit`. Prints as a table, best setting first.

    Attributes:
        rows: list of plain dicts, one per setting, sorted by the correlation of the
            advantage with `headline`. Each holds the setting; `"advantage"`,
            `"reward"` and `"alignment"`, of each quality the `"correlation"`,
            `"auc"` and `"gain"`; `"oracle_gain"`, `"equal_rewards"`,
            `"equal_quality"` and `"controls"`; `"informative"`, the number of blocks
            that vary both in reward and in a quality. Estimates are dicts of `value`,
            `low`, `high` (95 %) and `error`, `None` where nothing can be said.
        headline: str, the quality that settings are sorted by.
        judged: list of dicts, beside `rows`: `alignment`, `reward`, `advantage`,
            float32 `[N, n, K]`.
        qualities: dict from a quality's name to float64 `[N, n, K]`.
        live: bool `[N, K]`, blocks that count.
        rollouts: dict of `token_ids` int32 `[N, n, K, G]` and `anchors` int32
            `[N, K]`, as `EBFTModel.rewards` takes them.
    """

    def __init__(self, rows, headline, judged, qualities, live, rollouts):
        self.headline = headline
        order = sorted(range(len(rows)), key=lambda i: -_sort_value(rows[i], headline))
        self.rows = [rows[i] for i in order]
        self.judged = [judged[i] for i in order]
        self.qualities = qualities
        self.live = live
        self.rollouts = rollouts

    @property
    def best(self):
        """The row to take: the first whose controls came out, or simply the first."""
        passed = [row for row in self.rows if row["controls"]["passed"] is not False]
        return (passed or self.rows)[0]

    @property
    def advice(self):
        """Which setting to take, and whether EBFT is likely to help here."""
        best, title = self.best, title_of(self.headline)
        equal = best["equal_quality"][self.headline]["value"]
        found = best["advantage"][self.headline]["correlation"]
        parts = [self._verdict(best, found, title)]
        if equal is not None and equal > MOSTLY:
            parts.append(
                f"in {equal:.0%} of the blocks no rollout is better than another by "
                f"{title}, so that there is little to learn from: sample more or at "
                "another temperature, or choose other documents"
            )
        if best["documents"] < FEW:
            parts.append(
                f"{best['documents']} documents are few, and the intervals rough"
            )
        elif 0 < best["informative"][self.headline] < FEW:
            parts.append(
                f"{best['informative'][self.headline]} blocks that tell rollouts apart "
                "are few, and the intervals rough: audit more documents, or sample more"
            )
        silent = best["equal_rewards"]["value"]
        if silent is not None and silent > MOSTLY:
            parts.append(
                f"in {silent:.0%} of the blocks all rewards are equal: rollouts hardly "
                "differ, so raise the temperature"
            )
        if best["controls"]["passed"] is False:
            parts.append(
                "its controls failed: the truth itself does not get the highest "
                "alignment, so do not trust what it rewards"
            )
        elif best["controls"]["passed"] is None:
            parts.append("its controls could not be tried on these documents")
        return "; ".join(parts) + "."

    def _verdict(self, best, found, title):
        setting = describe(best)
        if found["value"] is None or found["error"] is None:
            return (
                f"Nothing can be said: no block has rollouts that differ both in "
                f"reward and in {title}, or all are of one document"
            )
        # The best of many is looked at: every one of them gets its share of 5 %.
        tail = 0.025 / len(self.rows)
        reach = NormalDist().inv_cdf(1.0 - tail) * found["error"]
        low, high = found["value"] - reach, found["value"] + reach
        measured = (
            f"correlation of advantage and {title} {_number(found['value'])}, "
            f"{_number(low)} to {_number(high)} with {len(self.rows)} settings "
            f"compared, from the {best['informative'][self.headline]} of "
            f"{best['blocks']} blocks that tell rollouts apart, AUC "
            f"{_number(best['advantage'][self.headline]['auc']['value'])}"
        )
        if low > 0.0:
            return (
                f"Take {setting}: its advantage prefers better rollouts, so EBFT can "
                f"help here ({measured})"
            )
        if high < 0.0:
            return (
                f"EBFT would make it worse: even the best setting, {setting}, prefers "
                f"worse rollouts ({measured})"
            )
        return (
            f"EBFT is not likely to help here: no setting's advantage reliably prefers "
            f"better rollouts; the best is {setting} ({measured})"
        )

    def to_dict(self):
        """Everything but the arrays, as JSON can hold it."""
        return {
            "headline": self.headline,
            "advice": self.advice,
            "best": self.rows.index(self.best),
            "rows": self.rows,
        }

    def __str__(self):
        rows, first = self.rows, self.rows[0]
        names = list(first["advantage"])
        header = [
            *SETTING_COLUMNS,
            *(title_of(name) for name in names),
            "AUC",
            "gain",
            "equal",
            "truth first",
        ]
        lines = [header, *(self._cells(row, names) for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines
        ]
        table.insert(1, "-" * len(max(table, key=len)))
        return "\n".join([self._caption(), "", *table, "", *self._notes(), self.advice])

    __repr__ = __str__

    def _caption(self):
        row = self.rows[0]
        return (
            f"{row['blocks']} blocks of {row['documents']} documents. Correlation "
            "within blocks of the advantage with each quality, 95 % interval over "
            f"documents;\nAUC and gain (of what the best choice would gain) for "
            f"{title_of(self.headline)}; equal: blocks whose rewards are all the same."
        )

    def _notes(self):
        row = self.rows[0]
        equal = ", ".join(
            f"{value['value']:.0%} by {title_of(name)}"
            for name, value in row["equal_quality"].items()
        )
        notes = [f"Blocks in which no rollout is better than another: {equal}."]
        tried = row["controls"]["blocks"]
        failed = [r for r in self.rows if r["controls"]["passed"] is False]
        if not tried:
            notes.append("Controls could not be tried.")
        elif failed:
            notes.append(
                f"CONTROLS FAILED (!) in {len(failed)} of {len(self.rows)} settings: "
                f"in {tried} blocks the truth should have the highest alignment."
            )
        else:
            notes.append(f"Controls came out in all settings, {tried} blocks.")
        if any(r["of_the_model"] for r in self.rows):
            notes.append("*: the model's own setting.")
        return notes

    def _cells(self, row, names):
        advantage, head = row["advantage"], self.headline
        gain, oracle = advantage[head]["gain"], row["oracle_gain"][head]
        controls = row["controls"]
        mark = {None: "-", True: "", False: " !"}[controls["passed"]]
        first = controls["truth_first"]["value"]
        own = "*" if row["of_the_model"] else ""
        return [
            _layers(row) + own,
            row["mode"],
            row["pooling"],
            str(row["whitening"] or "none")
            + ("" if row["normalize"] == "auto" else f", {row['normalize']}"),
            *(_interval(advantage[name]["correlation"]) for name in names),
            _number(advantage[head]["auc"]["value"]),
            f"{_number(gain['value'])} of {_number(oracle['value'])}",
            f"{row['equal_rewards']['value']:.0%}",
            ("" if first is None else f"{first:.0%}") + mark,
        ]


def title_of(quality):
    """A quality's name in words."""
    return TITLES[quality] if quality in QUALITIES else quality


def describe(row):
    """A setting in words."""
    whitening = (
        f'whitening="{row["whitening"]}"' if row["whitening"] else "no whitening"
    )
    taps = f"layers {_layers(row)}, " if row["tapped"] else ""
    mode = "" if row["mode"] in ("concat", "callable") else f'mode="{row["mode"]}", '
    return f'{taps}{mode}pooling="{row["pooling"]}", {whitening}'


def _layers(row):
    if row["layers"] is None:
        return "+".join(str(n) for n in row["tapped"]) or "own"
    return "+".join(f"{n:g}" for n in row["layers"])


def _sort_value(row, headline):
    value = row["advantage"][headline]["correlation"]["value"]
    return -2.0 if value is None else value


def _number(value):
    return "-" if value is None else f"{value:.2f}"


def _interval(estimate):
    if estimate["low"] is None:
        return _number(estimate["value"])
    return (
        f"{_number(estimate['value'])} "
        f"[{_number(estimate['low'])}, {_number(estimate['high'])}]"
    )
