"""The tiny models and the point sets of all tests: a new one is added here."""

EXACT = {"solver": "dopri8", "rtol": 1e-12, "atol": 1e-12}  # of differential equations
# Options with which each model is small enough to differentiate in full. Every model of
# flowtrain.models is here.
TINY = {
    "glow": {"levels": 2, "steps": 2, "width": 6},
    "realnvp": {"levels": 2, "width": 4, "blocks": 1},
    "nice": {"couplings": 4, "width": 8, "hidden_layers": 2},
    "planar": {"layers": 3},
    "maf": {"layers": 2, "width": 8, "hidden_layers": 1},
    "iaf": {"layers": 2, "width": 8, "hidden_layers": 1},
    "cnf": {"blocks": 2, "width": 8, "hidden_layers": 1, **EXACT},
    "causal": {"width": 6, "blocks": 1, "components": 2, "units": 3, "window": 1},
    "tarflow": {"patch": 2, "width": 8, "blocks": 2, "layers": 1},
    "jet": {"patch": 2, "width": 8, "couplings": 5, "layers": 1},
}
VARIATIONAL = {"name": "variational", "steps": 4, "width": 6}  # noise
# Models of points on a sphere and of angles. They fit no image.
TORUS = {"name": "torus", "layers": 2, "width": 8, "hidden_layers": 1, "bins": 4}
SPHERE = {"name": "sphere", "layers": 2, "width": 8, "hidden_layers": 1, "bins": 4}
# The data sets of points in the plane.
POINTS = ["two_moons", "eight_gaussians", "checkerboard", "pinwheel", "spiral", "rings"]
POINTS += ["torus"]  # two angles


def sets(**values) -> list[str]:
    """`sets(train__lr=1)` is `["--set", "train.lr=1"]`."""
    return [
        word
        for key, value in values.items()
        for word in ("--set", f"{key.replace('__', '.')}={value}")
    ]


# The words of a command: tiny models of the digits, a short run, and the demo with both.
WORDS = {
    "glow": ["--config", "glow_digits.yaml", *sets(model__steps=1, model__width=8)],
    "realnvp": ["--config", "realnvp_digits.yaml", *sets(model__width=4, model__blocks=1)],
    "nice": ["--config", "nice_digits.yaml", *sets(model__width=8, model__hidden_layers=1)],
}
CAUSAL = ["--config", "causal_digits.yaml", *sets(model__width=8, model__blocks=1, model__units=4)]
OF_DIGITS = sets(
    data__name="digits", data__validation=0.1, model__patch=2, model__width=8, model__layers=1
)
TARFLOW = ["--config", "tarflow_mnist_small.yaml", *OF_DIGITS]
JET = ["--config", "jet_cifar_small.yaml", *OF_DIGITS, *sets(model__couplings=5, data__flip=False)]
SHORT = sets(train__batch_size=32, train__lr=2e-3, train__num_steps=20, train__log_every=5)
SHORT += sets(train__validate_every=10, train__checkpoint_every=5)
SHORT += sets(train__sample_every=10, train__keep_checkpoints=2)
TINY_RUN = [*WORDS["glow"][2:], *SHORT]
SMALL = TINY_RUN[:8]  # the model, the size of a batch and the learning rate
