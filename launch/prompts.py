"""What the demo asks: questions about short texts, and questions alone. Written for this file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    name: str
    text: str


_TIDE_MILL = """\
The tide mill at the mouth of the creek was built in the spring of 1784 by two brothers who had never seen one. They \
had heard from a ship's carpenter that on the coast of Brittany people ground their corn with the sea, and the idea \
did not leave them alone. A wall of oak piles and clay was laid across the narrowest part of the creek, with a gate \
in the middle that opened by itself when the flood came in and fell shut when the water began to leave. Behind the \
wall the pond filled twice a day without anybody lifting a hand. When the sea had dropped far enough the miller \
raised a sluice, the pond ran out under the wheel, and for about five hours the stones turned.

The trouble with the sea is that it keeps its own calendar. High water comes fifty minutes later every day, so the \
hours of work crept around the clock, and the miller's family learned to sleep in pieces. On a night of spring tide \
in November the whole house was awake at two in the morning, sacks were hauled up by lamplight, and the smallest \
child was set to watch the hopper and ring a bell when it ran low. Farmers complained that they could never know \
when their flour would be ready. The brothers answered with a printed table, one sheet for each month, nailed to the \
door of the church. It is the oldest tide table known from that part of the coast, and the numbers in it are good to \
a quarter of an hour.

The mill worked for ninety-one years. A railway then brought cheap flour from the south, the gate was wedged open, \
and the pond went back to being a creek. Today the wall is a footpath, and at low water the stumps of the wheel \
house can still be seen, black and regular, like the teeth of a comb."""

_LIGHTHOUSE = """\
Before there were timers, the keeper of a lighthouse was the timer. The great lens floated on a ring of mercury and \
was turned by a weight that sank slowly down the hollow middle of the tower, exactly like the weight of a \
grandfather clock. Every two hours and forty minutes somebody had to climb the stairs and wind it up again, and if \
he slept, the light stood still and shone steadily in one direction, which is worse for a ship than no light at all: \
a steady light means another headland, thirty miles up the coast. So the rule was that two men were always on the \
island, and that the one on watch might not sit down in a chair that had a back.

The keepers' logbooks are dull to read, and that is their value. Day after day they note the wind, the height of the \
sea, the oil that was burned and the name of every ship that could be made out. In the winter of 1902 the log \
records eleven gales and a flock of starlings so thick that the panes had to be scraped clean. A student of birds \
later went through sixty years of those books and could show that the autumn passage had moved forward by nine days. \
Nobody who wrote the notes had any such thing in mind. They had been told to write down what they saw, and they did."""

_BREAD = """\
Sourdough bread needs only flour, water and salt, but it asks for patience. The starter, a jar of flour and water in \
which wild yeast and bacteria have settled, is fed the evening before. In the morning it should have doubled and \
smell a little of apples. Mix one part of starter with three parts of water and five parts of flour, leave it alone \
for half an hour, and only then add the salt, because salt makes the dough tight and slows the yeast. During the \
next four hours fold the dough over itself every thirty minutes; there is no need to knead it. It is ready to be \
shaped when it trembles like a jelly and bubbles show at the edge of the bowl. Shaped loaves rest overnight in the \
cold, which gives them their sourness. Bake them very hot, in a closed iron pot for the first twenty minutes, so \
that the steam keeps the crust soft while the loaf rises, and then open for another twenty-five until the crust is \
the colour of a chestnut."""

_TRAINS = """\
When the first railways were laid, every town kept its own time. Noon was when the sun stood highest, and that \
happens four minutes later for every degree one travels to the west. For a rider on a horse this made no difference, \
but a train could cover a degree in an hour and a half, and two trains on a single track had to agree about what \
time it was or meet head on. At first the companies printed timetables in the time of their head office and let the \
passengers do the sums. A large station might show three clocks side by side: one for the town, one for the line to \
the east and one for the line to the west. In the end the railways simply decided among themselves. On a Sunday in \
November 1883 the companies of North America set their clocks to four shared zones, and most towns, after some \
grumbling in the newspapers about the tyranny of the locomotive, followed within the year. The law caught up \
thirty-five years later."""

_OCTOPUS = """\
An octopus has about five hundred million nerve cells, roughly as many as a dog, but two thirds of them are not in \
its head. They lie in the arms. Each arm can taste, touch and decide on small matters by itself: an arm that has \
been shown a piece of crab will pass it along from sucker to sucker towards the mouth even when the way to the brain \
is cut. The brain seems to give orders of a general kind, such as to search that crack, and leaves the how to the \
arm. This is thrifty, since an arm without bones can bend in any place and direction, and no brain could plan all of \
that in detail. It also makes one wonder what it is like to be such an animal. Perhaps an octopus is surprised, now \
and then, by what its own arm comes back with."""

_RIVER = """\
The village lies where two rivers meet, and for as long as anyone remembers the two have been blamed for each \
other's floods. The northern one comes down from the moor and is brown and quick; it can rise by a metre in a night \
and be gone by noon. The southern one drains the flat country, rises slowly, and stays. Either of them alone is \
harmless. What the village fears is rain that falls first on the plain and two days later on the moor, for then both \
crests arrive together. After the flood of 1954 the council built a wall along the market street and sold the \
meadows upstream for houses. After the flood of 1993 it bought the meadows back, at ten times the price, took down \
forty houses and let the southern river have its old bends again. The engineer who drew the plan said in her speech \
that the cheapest reservoir is a field that nobody minds being wet. Since then the water has come into the market \
street once, in 2013, and it stood no higher than a hand. The wall is still there. People sit on it in the evening \
and, when asked whether it is needed, say that the wall was for the grandparents, the meadows are for the \
grandchildren, and the pump in the cellar is for themselves."""

_ABOUT = (
    Prompt("tide mill", f"{_TIDE_MILL}\n\nWhy did the family learn to sleep in pieces?"),
    Prompt("lighthouse", f"{_LIGHTHOUSE}\n\nWhy was a steady light dangerous?"),
    Prompt("bread", f"{_BREAD}\n\nList the steps of the recipe."),
    Prompt("trains", f"{_TRAINS}\n\nWhat happened in November 1883?"),
    Prompt("octopus", f"{_OCTOPUS}\n\nWhat does the arm decide by itself?"),
    Prompt("river", f"{_RIVER}\n\nWhat did the engineer say?"),
)

_BOTH = (
    Prompt("clocks", f"{_LIGHTHOUSE}\n\n{_TRAINS}\n\nWhat do both texts say about clocks?"),
    Prompt("patience", f"{_BREAD}\n\n{_OCTOPUS}\n\nWhich of the two needs more patience, the baker or the octopus?"),
    Prompt("water", f"{_RIVER}\n\n{_OCTOPUS}\n\nSummarize each text in one sentence."),
    Prompt("timetables", f"{_BREAD}\n\n{_TRAINS}\n\nGive both texts a title and explain it."),
    Prompt("watching", f"{_LIGHTHOUSE}\n\n{_OCTOPUS}\n\nWhich of the two texts is about animals?"),
    Prompt("mornings", f"{_BREAD}\n\n{_RIVER}\n\nWhat happens overnight in each of the two texts?"),
)

_ALONE = (
    Prompt("capital", "What is the capital of Portugal, and which river flows through it?"),
    Prompt("rainbow", "Explain to a child why the sky shows a rainbow after the rain."),
    Prompt("haiku", "Write a short poem about the first snow in a harbour town."),
    Prompt("gravity", "What would happen to the tides if the Moon were twice as far away?"),
    Prompt("email", "Write a polite email that asks a neighbour to turn down the music after ten in the evening."),
    Prompt("sorting", "Explain how merge sort works and how long it takes for n numbers."),
    Prompt("packing", "What should I pack for three days of walking in the mountains in September?"),
    Prompt("history", "Who invented printing with movable type, and why did it matter?"),
)


def prompts(count: int) -> list[Prompt]:
    """The first `count` prompts, long and short ones mixed; repeats with a number when there are too few."""
    mixed = [p for trio in zip(_ALONE, _ABOUT, _BOTH) for p in trio] + list(_ALONE[len(_ABOUT):])
    rounds = -(-count // len(mixed))
    return [Prompt(p.name if k == 0 else f"{p.name} ({k + 1})", p.text) for k in range(rounds) for p in mixed][:count]
