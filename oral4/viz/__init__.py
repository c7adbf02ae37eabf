"""Figures, sliders, players and molecules that need no kernel and no network.

==========================  ==========================================================
module                      what it gives
==========================  ==========================================================
:mod:`oral4.viz.style`      the house style of matplotlib figures, colours, labels
:mod:`oral4.viz.explore`    a figure with sliders, drawn beforehand
:mod:`oral4.viz.audio`      players of short waves, side by side
:mod:`oral4.viz.molecule`   a molecule that the reader turns
:mod:`oral4.viz.page`       what those three share: HTML, data and controls
==========================  ==========================================================

Import the function from its module, for example ``from oral4.viz.explore import explore``.
"""
