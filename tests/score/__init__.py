"""How well the kit finds faults: seeded ones in small ports, and none in correct ones."""

from tests.score import convolutional, sequence, training, unseen

FAMILIES = (
    *sequence.FAMILIES,
    *convolutional.FAMILIES,
    *training.FAMILIES,
    *unseen.FAMILIES,
)
