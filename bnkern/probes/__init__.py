"""Looking inside training: what can be measured (:mod:`.quantities`)."""
