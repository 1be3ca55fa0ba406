"""Training on CIFAR-10: networks (:mod:`.resnet`), data (:mod:`.cifar10`), runs (:mod:`.config`, :mod:`.loop`)."""
