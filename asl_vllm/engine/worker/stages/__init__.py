"""A decoder's layers, called one at a time whatever the architecture.

`find` finds the layers and their attention modules; `pipeline` and `transformers` are
two ways to call one layer (`base.Stages`), neither of which knows a model by its name;
`positions` is how many numbers a position has;
`proof` runs a short prompt at start-up and takes the way that equals the model's own
forward. `VllmDecoder` lends what a layer needs around a call: its forward context,
scratch pages and tap.
"""
