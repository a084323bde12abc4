"""One stored sample -> one labelled document."""
