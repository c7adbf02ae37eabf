"""Every claim of a paper beside what was measured: ``oral4/<chapter>/claims.toml``, verdicts, tables.

The file is a list of ``[[claim]]`` tables. A claim that an experiment answers::

    [[claim]]
    id = "C1"                                   # unique in the chapter; a letter, then letters, digits or "-"
    title = "Cost grows linearly with length"   # one line
    text = "Pyramidal attention needs a number of scores that is proportional to the length."  # our own words
    where = "Section 3.3, Proposition 1"        # the place in the paper
    paper = "O(L)"                              # the paper's figure, as text
    provenance = "abstract of the paper"        # how we know the paper's figure
    page = "pyraformer/03_kernels"              # page of the book, no suffix; "#anchor" allowed: links to the cell
    record = "pyraformer/cost-mini"             # the record that answers, oral4/records/<record>.json
    metric = "slope_pyramid"                    # a metric of that record with one number a seed
    holds = { between = [0.9, 1.1] }            # decided on the whole 95 % interval
    direction = { below = 1.5 }                 # decided on the mean; optional, the same rule as `holds` if absent
    format = ".2f"                              # how our figure is printed; optional, ".3g"
    note = "Two cores; the GPU is not shown."   # optional, printed under the claim

A claim that nothing here answers has a ``reason`` in place of the record, its metric, the rules and the format::

    [[claim]]
    id = "C7"
    title = "..."
    text = "..."
    where = "Table 2"
    paper = "0.808 MSE"
    provenance = "repository of the authors, README"
    page = "pyraformer/06_results"
    reason = "The data set is not public."      # why it is not shown here

A rule is a table with exactly one key: ``below = x`` (value < x), ``above = x`` (value > x) or ``between = [a, b]``
(a <= value <= b). What satisfies ``holds`` must satisfy ``direction`` too. The verdict, in this order:

================== ==================================================================================
holds              every value of the 95 % interval over seeds satisfies ``holds``
holds in direction the mean satisfies ``direction``
contradicted       no value of the 95 % interval satisfies ``direction``
not shown here     all else: no record, or the mean fails and the interval is too wide (or is missing,
                   for one seed has none) to contradict
================== ==================================================================================

So the two strong verdicts need an interval, the two weak ones do not, and none is easier to get for us than against us.
"""
