"""Parts with one formula and one parameter shape that several systems share."""
