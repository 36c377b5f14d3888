"""The colours of what is drawn."""

#: Okabe and Ito's colours, which readers of every kind of colour vision tell apart, but for their yellow, which is a grey here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
