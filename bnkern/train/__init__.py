"""Training on CIFAR-10: networks (:mod:`.resnet`), data (:mod:`.cifar10`) and runs (:mod:`.config`, :mod:`.loop`)."""
