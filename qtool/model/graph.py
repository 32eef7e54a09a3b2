"""The site graph: every place where a model's values may be transformed, and the linears around it.

A *site* is a vector that linears read (``layers.3.attn_in``), or one that only an operator sees (``layers.3.vo``, a
value head; ``residual``, the stream through all blocks). Sites are named ``layers.<i>.<site>``, those inside an expert
``layers.<i>.experts.<e>.<site>``; ``residual`` and ``head_in`` belong to the whole model. Built from a family's data
and a config, never by looking at modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import cycle

from qtool.errors import UsageError
from qtool.model.family import Experts, Family, Linear, Norm, Part, Rotary

Group = str  # "orthogonal", "diag", "signed_perm", "perm", "shift", "general"

RESIDUAL = "residual"
HEAD_IN = "head_in"
TOKENS = "tokens"
"""What an embedding reads: no site, since nothing acts on it."""
EXPERTS = "experts."
"""How the names of sites inside experts begin."""
OUTPUT = "out"
"""Kind of the sites that are the output of one linear, ``out.<module>``: folded into its rows, undone behind it."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that sites need, read from its config.

    Attributes:
        head_dim: Length of a query or key head.
        value_dim: Length of a value head.
        experts: Routed experts of a sparse block, 0 without any.
        chosen: Experts that a token is sent to.
        sparse: Whether each block has experts.
        turned: Channels of a query or key head that positions turn; the others pass.
        sizes: Every size that families speak of, by name: rows of parts, widths of input sites.
    """

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    vocab: int
    max_positions: int
    tied: bool
    experts: int = 0
    chosen: int = 0
    sparse: tuple[bool, ...] = ()
    turned: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Site:
    """A place where operators may act.

    Attributes:
        id: ``residual``, ``layers.3.attn_in``, ``layers.3.experts.5.up_down``, ….
        name: The id without its layer.
        layer: Block index, or None for the whole model's sites.
        dim: Length of the vector that an operator acts on (one head's, where ``heads`` > 1); of a linear's output 0,
            since the config does not say.
        heads: Number of such vectors side by side: key/value heads.
        foldable: Operator groups that the producers of this site can absorb exactly.
        online: Whether an operator can run in the forward pass here.
        why: Why what is not in ``foldable`` cannot be folded, for refusals.
        refused: Operator groups that are not exact here even online, and why.
        ties: Pairs of channels that a diagonal must treat alike, since rotary positions turn them together.
    """

    id: str
    name: str
    layer: int | None
    dim: int
    heads: int
    foldable: frozenset[Group]
    online: bool
    why: str = ""
    refused: Mapping[Group, str] = field(default_factory=dict, hash=False)
    ties: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        """The name that sites of this kind share: ``up_down`` for every MLP and every expert."""
        return OUTPUT if self.name.startswith(f"{OUTPUT}.") else self.name.rpartition(".")[2]


@dataclass(frozen=True)
class LinearSite:
    """One linear of one block.

    Attributes:
        name: Full module name.
        layer: Block index.
        spec: Its data; ``module`` and ``reads`` are inside the block, those of an expert's linear included.
        reads: Id of the site that it reads.
        stage: Its place in the order of execution, counted in kinds of input sites.
        expert: The expert that it belongs to, or None.
    """

    name: str
    layer: int
    spec: Linear
    reads: str
    stage: int
    expert: int | None = None

    @property
    def observed(self) -> str:
        """Name (without layer) under which an expert's input has statistics of its own: of the tokens that it gets."""
        kind = self.spec.reads.rpartition(".")[2]
        return self.spec.reads if self.expert is None else f"{EXPERTS}{self.expert}.{kind}"

    @property
    def puts_out(self) -> str:
        """Name (without layer) of the site that its output is."""
        return f"{OUTPUT}.{self.spec.module}"

    @property
    def fused_with(self) -> tuple[str, str]:
        """What linears share that engines may fuse into one (q, k, v; gate, up): the site, and the module around."""
        return self.reads, self.name.rpartition(".")[0]


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
    def head(self) -> LinearSite:
        """The head, which is in no block: quantized only where an exception of a scheme names it."""
        name = self.family.head
        return LinearSite(name, self.dims.num_layers, Linear(name, HEAD_IN), HEAD_IN, 0)

    @cached_property
    def embedding(self) -> LinearSite:
        """The embedding as a linear that reads tokens: quantized as the head is, behind which it comes."""
        name = self.family.embedding
        return LinearSite(name, self.dims.num_layers + 1, Linear(name, TOKENS), TOKENS, 0)

    @property
    def ends(self) -> tuple[LinearSite, LinearSite]:
        """What may be quantized outside of the blocks: head and embedding."""
        return self.head, self.embedding

    def linear(self, name: str) -> LinearSite:
        """Find a linear that is quantized, head or embedding by its full module name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, LinearSite]:
        return {linear.name: linear for linear in (*self.linears, *self.ends)}

    def linears_of(self, layer: int) -> tuple[LinearSite, ...]:
        """Return the linears of one block that are quantized."""
        return tuple(linear for linear in self.readers_of(layer) if not linear.spec.kept)

    def readers_of(self, layer: int) -> tuple[LinearSite, ...]:
        """Return all linears of one block, routers and gates that stay in full precision included."""
        prefix, stages = self.block_name(layer), self._stages
        return tuple(
            LinearSite(
                f"{prefix}.{spec.module}",
                layer,
                spec,
                f"layers.{layer}.{spec.reads}",
                stages.index(spec.reads.rpartition(".")[2]),
                expert,
            )
            for spec, expert in self._specs(is_sparse=self.is_sparse(layer))
        )

    def input_sites_of(self, layer: int) -> tuple[str, ...]:
        """Return the names (without layer) of the sites that linears of a block read, in order of execution."""
        return tuple(dict.fromkeys(spec.reads for spec, _ in self._specs(is_sparse=self.is_sparse(layer))))

    def is_sparse(self, layer: int) -> bool:
        """Say whether a block has experts."""
        return bool(self.dims.sparse) and self.dims.sparse[layer]

    def block_name(self, layer: int) -> str:
        """Return the module name of a block."""
        return f"{self.family.layers}.{layer}"

    def site(self, site_id: str) -> Site:
        """Find a site by id; ``layers.3.out.self_attn.q_proj`` is the output of a linear.

        Raises:
            UsageError: The model has no such site.
        """
        if site_id in self._outputs:
            return self._outputs[site_id]
        if site_id not in self.sites:
            raise UsageError(
                f"family `{self.family.name}` has no site `{site_id}`",
                facts=(
                    ("sites of a block", ", ".join(dict.fromkeys(s.kind for s in self.sites.values()))),
                    ("outputs of linears", f"layers.<i>.{OUTPUT}.<module>"),
                ),
            )
        return self.sites[site_id]

    def of_kind(self, kind: str, layer: int | None = None) -> Iterator[Site]:
        """Yield the sites of a kind, of one block or of all: ``up_down`` is that of the MLP and of each expert."""
        return (site for site in (self.sites.values() if layer is None else self._block(layer)) if site.kind == kind)

    @cached_property
    def _outputs(self) -> dict[str, Site]:
        """The outputs of the linears that are quantized, by id."""
        every = frozenset({"orthogonal", "diag", "signed_perm", "perm", "general"})
        places = ((one.layer, one.puts_out) for one in self.linears)
        sites = (Site(f"layers.{layer}.{name}", name, layer, 0, 1, every, online=False) for layer, name in places)
        return {site.id: site for site in sites}

    def consumers(self, site: Site) -> tuple[LinearSite, ...]:
        """Return the linears that read a site (for ``vo``, those that read the heads after attention)."""
        reads = "o_in" if site.name == "vo" else site.name
        if site.layer is None:
            return ()
        return tuple(linear for linear in self.linears_of(site.layer) if linear.spec.reads == reads)

    def norm_of(self, name: str) -> Norm | None:
        """Return the norm that produces an input site, by the site's name without its layer; None without one."""
        return self.family.norms.get(name)

    def norms_in(self, layer: int) -> tuple[Norm, ...]:
        """Return the norms in front of the linears of a block, in the order of its sites."""
        norms = (self.norm_of(site) for site in self.input_sites_of(layer))
        return tuple(dict.fromkeys(norm for norm in norms if norm is not None))

    def from_residual(self, name: str) -> bool:
        """Say whether an input site is the residual behind a norm, or the residual itself."""
        if name not in self.family.norms:
            return False
        norm = self.family.norms[name]
        return norm is None or norm.of_residual

    def width(self, name: str) -> int:
        """Return the length of the vector that the linears of the input site ``name`` read."""
        sizes, (owner, _, kind) = self.dims.sizes, name.rpartition(".")
        owner = owner.partition(".")[0]
        for known in (f"{owner}.{kind}", kind) if owner else (kind,):
            if known in sizes:
                return sizes[known]
        return self.dims.hidden

    def rows(self, linear: Linear) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Yield each site that a linear writes, with the rows that do: one slice, or one a head where parts repeat."""
        return self._rows(linear, lambda part: part.writes)

    def rows_in_order(self, linear: Linear) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Yield each site whose permutations reorder rows of a linear that does not write it, with those rows."""
        return self._rows(linear, lambda part: part.feeds)

    def _rows(self, linear: Linear, site_of: Callable[[Linear | Part], str]) -> Iterator[tuple[str, tuple[slice, ...]]]:
        if not linear.parts:
            if site_of(linear):
                yield site_of(linear), (slice(None),)
            return
        repeats = self.dims.num_kv_heads if linear.per_head else 1
        found: dict[str, list[slice]] = {}
        start = 0
        for part, _ in zip(cycle(linear.parts), range(repeats * len(linear.parts)), strict=False):
            stop = start + self.dims.sizes[part.size]
            if site_of(part):
                found.setdefault(site_of(part), []).append(slice(start, stop))
            start = stop
        yield from ((site, tuple(slices)) for site, slices in found.items())

    @cached_property
    def _stages(self) -> tuple[str, ...]:
        """Kinds of input sites in order of execution, over dense and sparse blocks."""
        every = (spec for sparse in (False, True) for spec, _ in self._specs(is_sparse=sparse))
        return tuple(dict.fromkeys(spec.reads.rpartition(".")[2] for spec in every))

    def _specs(self, *, is_sparse: bool) -> tuple[tuple[Linear, int | None], ...]:
        return _specs(self.family.linears, self.family.experts, self.dims.experts, is_sparse)

    def _residual(self) -> Site:
        sandwich = sorted({linear.writes_through for linear in self.family.linears if linear.writes_through})
        norms = [norm for norm in (self.family.final_norm, *self.family.norms.values()) if norm is not None]
        foldable = frozenset({"orthogonal", "signed_perm", "perm"})
        why = "RMS normalisation commutes with orthogonal operators only; put scales at attn_in and mlp_in"
        if sandwich:
            foldable = frozenset({"signed_perm", "perm"})
            why = f"its outputs pass the norms {', '.join(sandwich)}; use block transforms at attn_in and mlp_in"
        if any(norm.kind == "layer" for norm in norms if norm.of_residual):
            foldable = frozenset({"perm"})
            why = "its norms remove the mean, which only permutations keep; use block transforms at attn_in and mlp_in"
        if self.family.fixed_residual:
            foldable, why = frozenset(), self.family.fixed_residual
        return Site(RESIDUAL, RESIDUAL, None, self.dims.hidden, 1, foldable, online=False, why=why)

    def _block(self, layer: int) -> Iterator[Site]:
        d, norms, specs = self.dims, self.family.norms, self._specs(is_sparse=self.is_sparse(layer))
        written = {site for spec, _ in specs for site, _ in self.rows(spec)}
        ordered = {site for spec, _ in specs for site, _ in self.rows_in_order(spec)}
        site = partial(self._site, layer)
        for name in self.input_sites_of(layer):
            norm = norms.get(name)
            if norm is not None:
                shift = {"shift"} if norm.kind == "layer" and norm.bias else set()
                why = "the norm in front has only a weight; what is not diagonal runs online"
                yield site(name, self.width(name), 1, {"diag", *shift}, online=True, why=why)
            elif name in norms:
                yield site(
                    name, self.width(name), 1, set(), online=True, why="no norm lies in front, only the residual"
                )
            else:
                why = "attention lies in front" if name == "o_in" else "the activation function lies in front"
                folds = {group for group, known in (("diag", written), ("perm", ordered)) if name in known}
                why = "only diagonals and permutations pass the product with the gate" if name in written else why
                yield site(name, self.width(name), 1, folds, online=True, why=why)
        if "vo" in written:
            every = {"orthogonal", "diag", "signed_perm", "perm", "shift", "general"}
            yield site("vo", d.value_dim, d.num_kv_heads, every, online=False)
        if self.family.rotary is not None and {"queries", "keys"} <= written:
            shared = self.family.rotary.norms is not None
            why = "rotary positions mix its channels in pairs; only a diagonal that treats a pair alike passes them"
            found = site("qk_pre", d.head_dim, 1 if shared else d.num_kv_heads, {"diag"}, online=False, why=why)
            yield replace(found, ties=self._ties(self.family.rotary))
        yield site("qk_post", d.head_dim, 1, set(), online=True, why="rotary positions lie in front")

    def _site(
        self, layer: int, name: str, dim: int, heads: int, foldable: set[Group], *, online: bool, why: str = ""
    ) -> Site:
        """Return a site of a block, which absorbs what is not refused there."""
        refused = self._refused(name, layer)
        folds = frozenset(foldable - refused.keys())
        return Site(f"layers.{layer}.{name}", name, layer, dim, heads, folds, online, why, refused)

    def _ties(self, rotary: Rotary) -> tuple[tuple[int, int], ...]:
        """Return the pairs of channels of a query or key that positions turn together."""
        half = self.dims.turned // 2
        if rotary.pairs == "halves":
            return tuple((i, i + half) for i in range(half))
        return tuple((2 * i, 2 * i + 1) for i in range(half))

    def _refused(self, name: str, layer: int) -> Mapping[Group, str]:
        """Return what is not exact at a site of a block, not even online."""
        logits = self.family.logits
        if name == "qk_post" and logits != "free":
            return {"shift": "it adds a constant to a query's logits, which a cap or a sink does not bear"}
        if name == "vo" and logits == "sink":
            return {"shift": "a sink takes its share of the attention, so the weights do not sum to one"}
        if any(spec.kept for spec, _ in self._specs(is_sparse=self.is_sparse(layer)) if spec.reads == name):
            return {"shift": "the router that reads it has no bias to take it up"}
        return {}


@lru_cache(maxsize=64)
def _specs(
    linears: tuple[Linear, ...], experts: Experts | None, count: int, is_sparse: bool
) -> tuple[tuple[Linear, int | None], ...]:
    """Return the linears of a block, each with the expert that it belongs to; experts come last."""
    here = [spec for spec in linears if spec.blocks in ("all", "sparse" if is_sparse else "dense")]
    found: list[tuple[Linear, int | None]] = [(spec, None) for spec in here]
    if is_sparse and experts is not None:
        found += [(_of_expert(spec, experts, e), e) for spec in experts.linears for e in range(count)]
    return tuple(found)


def _of_expert(spec: Linear, experts: Experts, expert: int) -> Linear:
    """Return an expert's linear as the block sees it."""

    def own(site: str) -> str:
        return site if site in ("", RESIDUAL, "mlp_in") else f"{EXPERTS}{expert}.{site}"

    parts = tuple(Part(part.size, own(part.writes), own(part.feeds)) for part in spec.parts)
    module = f"{experts.module}.{expert}.{spec.module}"
    reads, writes, feeds = own(spec.reads), own(spec.writes), own(spec.feeds)
    return replace(spec, module=module, reads=reads, writes=writes, feeds=feeds, parts=parts)
