"""The site graph: every place where a model's values may be transformed, and the linears around it.

A *site* is a vector that linears read (``layers.3.attn_in``), or one that only an operator sees (``layers.3.vo``, a
value head; ``residual``, the stream through all blocks). Sites are named ``layers.<i>.<site>``; ``residual`` and
``head_in`` belong to the whole model. Built from a family's data and a config, never by looking at modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qtool.errors import UsageError
from qtool.model.family import Family, Linear

Group = str  # "orthogonal", "diag", "signed_perm", "perm", "shift", "general"

RESIDUAL = "residual"
HEAD_IN = "head_in"


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that sites need, read from its config."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Site:
    """A place where operators may act.

    Attributes:
        id: ``residual``, ``layers.3.attn_in``, ….
        name: The id without its layer.
        layer: Block index, or None for the whole model's sites.
        dim: Length of the vector that an operator acts on (one head's, where ``heads`` > 1).
        heads: Number of such vectors side by side: key/value heads.
        foldable: Operator groups that the producers of this site can absorb exactly.
        online: Whether an operator can run in the forward pass here.
        why: Why what is not in ``foldable`` cannot be folded, for refusals.
    """

    id: str
    name: str
    layer: int | None
    dim: int
    heads: int
    foldable: frozenset[Group]
    online: bool
    why: str = ""


@dataclass(frozen=True)
class LinearSite:
    """One linear of one block: its full module name, the linear's data and the id of the site that it reads."""

    name: str
    layer: int
    spec: Linear
    reads: str
    stage: int


@dataclass(frozen=True)
class ModelGraph:
    """Sites and linears of one model."""

    family: Family
    dims: Dimensions

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every site by id."""
        whole = (self._residual(), Site(HEAD_IN, HEAD_IN, None, self.dims.hidden, 1, frozenset({"diag"}), online=False))
        return {site.id: site for site in (*whole, *(s for i in range(self.dims.num_layers) for s in self._block(i)))}

    @cached_property
    def linears(self) -> tuple[LinearSite, ...]:
        """Every linear that is quantized, in order of execution."""
        return tuple(linear for i in range(self.dims.num_layers) for linear in self.linears_of(i))

    @cached_property
    def input_sites(self) -> tuple[str, ...]:
        """Names (without layer) of the sites that linears read, in order of execution."""
        return tuple(dict.fromkeys(linear.reads for linear in self.family.linears))

    def linears_of(self, layer: int) -> tuple[LinearSite, ...]:
        """Return the linears of one block."""
        prefix = self.block_name(layer)
        return tuple(
            LinearSite(
                f"{prefix}.{spec.module}",
                layer,
                spec,
                f"layers.{layer}.{spec.reads}",
                self.input_sites.index(spec.reads),
            )
            for spec in self.family.linears
        )

    def block_name(self, layer: int) -> str:
        """Return the module name of a block."""
        return f"{self.family.layers}.{layer}"

    def site(self, site_id: str) -> Site:
        """Find a site by id.

        Raises:
            UsageError: The model has no such site.
        """
        if site_id not in self.sites:
            raise UsageError(
                f"family `{self.family.name}` has no site `{site_id}`",
                facts=(("sites of a block", ", ".join(dict.fromkeys(s.name for s in self.sites.values()))),),
            )
        return self.sites[site_id]

    def sites_named(self, name: str) -> Iterator[Site]:
        """Yield the sites of this name, one a block."""
        return (site for site in self.sites.values() if site.name == name)

    def consumers(self, site: Site) -> tuple[LinearSite, ...]:
        """Return the linears that read a site (for ``vo``, those that read the heads after attention)."""
        reads = "o_in" if site.name == "vo" else site.name
        if site.layer is None:
            return ()
        return tuple(linear for linear in self.linears_of(site.layer) if linear.spec.reads == reads)

    def producers(self, site: Site) -> tuple[LinearSite, ...]:
        """Return the linears whose output feeds a site directly."""
        layers = range(self.dims.num_layers) if site.layer is None else (site.layer,)
        return tuple(linear for i in layers for linear in self.linears_of(i) if linear.spec.writes == site.name)

    def width(self, name: str) -> int:
        """Return the length of the vector that the linears of the input site ``name`` read."""
        d = self.dims
        return {"o_in": d.num_heads * d.head_dim, "up_down": d.intermediate}.get(name, d.hidden)

    def _residual(self) -> Site:
        sandwich = sorted({linear.writes_through for linear in self.family.linears if linear.writes_through})
        foldable = frozenset({"orthogonal", "signed_perm", "perm"})
        why = "RMS normalisation commutes with orthogonal operators only; put scales at attn_in and mlp_in"
        if sandwich:
            foldable = frozenset({"signed_perm", "perm"})
            why = f"its outputs pass the norms {', '.join(sandwich)}; use block transforms at attn_in and mlp_in"
        if any(norm.kind == "layer" for norm in (self.family.final_norm, *self.family.norms.values())):
            foldable = frozenset({"perm"})
            why = "its norms remove the mean, which only permutations keep; use block transforms at attn_in and mlp_in"
        return Site(RESIDUAL, RESIDUAL, None, self.dims.hidden, 1, foldable, online=False, why=why)

    def _block(self, layer: int) -> Iterator[Site]:
        d, norms = self.dims, self.family.norms
        written = {linear.writes for linear in self.family.linears}

        def site(name: str, dim: int, heads: int, foldable: set[Group], *, online: bool, why: str = "") -> Site:
            return Site(f"layers.{layer}.{name}", name, layer, dim, heads, frozenset(foldable), online, why)

        for name in self.input_sites:
            if name in norms:
                shift = {"shift"} if norms[name].kind == "layer" else set()
                why = "the norm in front has only a weight; what is not diagonal runs online"
                yield site(name, d.hidden, 1, {"diag", *shift}, online=True, why=why)
            elif name in written:
                why = "only a diagonal passes the product with the gate"
                yield site(name, self.width(name), 1, {"diag"}, online=True, why=why)
            else:
                yield site(name, self.width(name), 1, set(), online=True, why="attention lies in front")
        if "vo" in written:
            every = {"orthogonal", "diag", "signed_perm", "perm", "shift", "general"}
            yield site("vo", d.head_dim, d.num_kv_heads, every, online=False)
        yield site("qk_post", d.head_dim, 1, set(), online=True, why="rotary positions lie in front")
