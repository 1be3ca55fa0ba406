"""Training on CIFAR-10: the networks of the paper (:mod:`.resnet`) and its data (:mod:`.cifar10`)."""
