"""`params.yaml` as frozen, typed sections: one file a section, so that a change of one touches no other stage."""
