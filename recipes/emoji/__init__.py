"""The recipe of the bundled text-to-image model: emoji of many artists, trained from nothing on a CPU."""
