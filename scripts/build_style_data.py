#!/usr/bin/env python3
"""Write the style sample data: recipes/data/style_train.jsonl and style_held_out.jsonl.

A house style in five rules: no opening that says nothing, no word that only adds weight, the plain verb, the plain
preposition, and figures for numbers. A row is a sentence in the heavy style and the same sentence by the rules. Each
rule is in training; the person and the things of a held-out sentence, its room, and its frame (what is said of the
doing, and where the place stands) are not, so what is scored is whether the rules carry over and the rest is kept. The
people and things are many because of few a model learns the words, and of many to copy.

    scripts/build_style_data.py                           the two files that ship
    scripts/build_style_data.py --development dev.jsonl   sentences of a third kind, to choose settings by
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sample_rows

SEED, TRAIN_ROWS, HELD_OUT_ROWS = 0, 900, 100

OPENINGS = (
    "Please be advised that ",
    "It should be noted that ",
    "We would like to inform you that ",
    "It goes without saying that ",
    "",
)
WEIGHTS = ("very ", "really ", "extremely ", "absolutely ", "")
PLAIN_BY_VERB = {
    "utilise": "use",
    "purchase": "buy",
    "obtain": "get",
    "require": "need",
    "possess": "have",
    "construct": "make",
    "transport": "carry",
    "discover": "find",
    "relinquish": "give up",
    "demonstrate": "show",
    "retain": "keep",
    "dispatch": "send",
}
PLAIN_BY_PREPOSITION = {
    "in close proximity to": "near",
    "in the interior of": "in",
    "at the rear of": "behind",
    "adjacent to": "beside",
    "in the direction of": "towards",
    "on the exterior of": "outside",
}
NUMBERS = "two three four five six seven eight nine ten eleven twelve"
FIGURE_BY_NUMBER = {word: str(figure) for figure, word in enumerate(NUMBERS.split(), start=2)}

PEOPLE = (
    "actor actress admiral adult adviser agent ambassador analyst ancestor angel apprentice archer architect"
    " archivist artist assistant astronaut astronomer athlete attorney aunt author baby bachelor baker ballerina"
    " banker barber baron barrister beggar biker biologist bishop blacksmith boatman bookkeeper botanist bowler boxer"
    " boy brewer bricklayer bride broker brother builder burglar businessman butcher butler buyer cadet camper"
    " candidate captain caretaker carpenter carrier cashier champion chaplain chemist chief child citizen clergyman"
    " clerk client climber clown coach coachman cobbler collector colonel comedian commander companion composer"
    " conductor consul cook cooper corporal counsellor countess cousin cowboy craftsman creator critic customer"
    " cyclist dancer daughter deacon dealer dentist deputy designer detective diplomat director diver doctor donor"
    " doorman driver drummer duchess duke editor elder electrician emperor employee employer enemy engineer"
    " entertainer envoy escort examiner expert explorer farmer father fiddler fighter firefighter fisherman florist"
    " footman foreigner foreman forester founder friar friend gambler gardener geologist ghost girl glazier goalkeeper"
    " goldsmith golfer governess governor grandfather grandmother guardian guest guide guitarist gunner hairdresser"
    " harpist headmaster healer heir herald hermit hero historian host hostess housekeeper hunter husband immigrant"
    " infant inhabitant inspector instructor interpreter inventor investor janitor jeweller jockey joiner journalist"
    " judge juggler juror king knight laborer lady landlord lawyer leader lecturer librarian lieutenant linguist"
    " lodger lord magician magistrate maid major manager mariner marshal mason master mayor mechanic mediator member"
    " merchant messenger midwife miller miner minister missionary monarch monk mother mountaineer musician narrator"
    " navigator neighbour nephew newcomer niece nobleman notary novelist nun nurse officer official operator optician"
    " orator organist orphan owner painter parent parson partner passenger pastor patient patron peasant pedestrian"
    " performer pharmacist philosopher photographer physician physicist pianist pilgrim pilot pioneer pirate planner"
    " planter player plumber poet policeman politician pope porter postman potter preacher president priest prince"
    " princess printer prisoner producer professor prophet psychologist publisher pupil queen rabbi ranger reader"
    " rebel receptionist recruit referee refugee reporter researcher resident rider robber roofer ruler runner sailor"
    " saint salesman scholar scientist scout sculptor seaman secretary seller senator sergeant servant settler"
    " shepherd sheriff shopkeeper singer sister skater skier slave smith soldier solicitor son speaker specialist"
    " spectator sponsor squire statesman stranger student supervisor surgeon surveyor swimmer tailor tanner teacher"
    " teenager tenant theologian thief tourist trader trainer traitor translator traveller treasurer tutor twin uncle"
    " usher vicar victim villager violinist visitor waiter waitress warden warrior watchman weaver welder widow wife"
    " winner witch witness wizard woman woodcutter worker worshipper wrestler writer youth zoologist"
)
THINGS = (
    "alarms albums altars anchors animals ankles ants anvils apples aprons arches armchairs arms arrows atlases axes"
    " badges bags balloons balls bandages banks banners barks barrels bars bases basins baskets baths bats batteries"
    " beacons beads beaks beams beans bears beds bees beets bells belts benches bicycles bills birds biscuits blades"
    " blankets blocks boats bolts bombs bonds bones bonnets books boots bottles bowls bows boxes bracelets brains"
    " branches bricks bridges brooches brooms buckets bugs buildings bulbs bullets bundles buns buses buttons cabbages"
    " cabinets cables cages cakes calendars camels cameras camps candles candlesticks cannons canoes cans caps cards"
    " carpets carriages carrots cars carts cases castles cats cellars cells chains chairs charts chests chickens"
    " chisels churches cigars circuits clamps cloaks clocks cloths clouds clubs coats coffins coils coins collars"
    " columns combs compasses computers cones costumes couches counters courts cows cradles cranes crates crayons"
    " crosses crowns crows crystals cubes cucumbers cupboards cups curtains cushions cylinders daggers dams decks"
    " desks dials diamonds discs dishes documents dogs dolls donkeys doors dots drawers drawings dresses drills drinks"
    " drops drugs drums ducks eagles earrings ears eggs elephants emeralds engines envelopes eyes fabrics fans farms"
    " feathers fences ferns ferries fiddles fields figs files filters fingers fins fires flags flasks flies flowers"
    " flutes folders forests forks fountains frames frogs galleries games gardens garments gates gears geese gems"
    " glasses gloves goats grapes guitars guns hammers hammocks handles hares harps hats hawks heads hearts heaters"
    " hedges helmets hens herbs hinges hoods hooks horns horses hoses houses huts insects instruments islands jackets"
    " jars jewels jugs kettles keyboards keys kites knives knots labels ladders lambs lamps lanterns leaves legs"
    " lemons lenses letters levers lids lights lilies lions lists lockets locks logs lorries machines magazines"
    " magnets maps marbles masks masts mats mattresses medals melons metals meters mice microscopes mirrors missiles"
    " mittens monkeys moons mops moths motors mountains mugs mushrooms nails napkins necklaces needles nests nets"
    " newspapers noses notebooks notes nuts oaks oars olives onions oranges orchids orders organs ovens owls oysters"
    " packages paddles pads pages pails paintings palms panels pans papers parcels parks parrots patches paths peaches"
    " pearls pears peas pebbles pedals pencils pendants pens pets photographs pianos pictures pies pigeons pigs"
    " pillars pillows pines pins pipes pistols planes planks plates ploughs plums pods ponds ponies pools poppies"
    " posters posts potatoes pots pouches pumpkins pumps puppets purses puzzles quilts rabbits racks radios rafts"
    " rails rakes rats razors reeds ribbons rifles rings rivers roads robes rocks rods rolls roofs ropes roses"
    " rugs sacks saddles sails sandals sandwiches saucers saws scarves screens screws scrolls seals seats seeds shawls"
    " sheets shells shelves shields ships shirts shoes shops shovels shrubs shutters signs sinks skates skins skirts"
    " sleds sleeves slippers snails snakes socks sofas spades spears spiders spikes spoons springs stages stairs"
    " stamps stands stars statues steaks stems sticks stones stools stoves straps streets strings suitcases suits"
    " sweaters swords tables tablets tanks tapes taps targets tassels telephones telescopes tents threads thrones"
    " tickets ties tigers tiles tins toasters tomatoes tools torches towels towers toys tracks tractors trains traps"
    " trays treasures trees triangles trolleys trophies trumpets trunks tubes tubs tulips tunnels turnips turtles"
    " tusks umbrellas urns vans vases vehicles veils vessels vests vines violins wagons walls wands wardrobes watches"
    " waves weapons webs wedges wheels whips whistles wigs windows wings wires wolves worms wreaths yachts zebras"
    " zippers"
)
QUALITIES = "large small old new heavy light red green blue white black yellow round flat thin long short strong"

DOING = ("will", "has to", "can", "did not", "wants to", "would", "had to", "may not", "must", "cannot")
ORDERS = (
    "{opening}the {person} {preposition} room {room} {doing} {verb} {number} {weight}{quality} {things}.",
    "{opening}the {person} {doing} {verb} {number} {weight}{quality} {things} {preposition} room {room}.",
    "{opening}{preposition} room {room} the {person} {doing} {verb} {number} {weight}{quality} {things}.",
    "{opening}the {person} {doing} go to room {room} in order to {verb} {number} {weight}{quality} {things}.",
)
FRAMES = [order.replace("{doing}", doing) for doing in DOING for order in ORDERS]


@dataclass(frozen=True)
class Stock:
    """What the sentences of one part are made of beside the rules; no two parts have any of it in common."""

    people: Sequence[str]
    things: Sequence[str]
    rooms: Sequence[int]
    frames: Sequence[str]


def _stock(tenths: range) -> Stock:
    def share(choices: Sequence[Any]) -> list[Any]:
        shuffled = list(choices)
        random.Random(SEED).shuffle(shuffled)
        return [choice for place, choice in enumerate(shuffled) if place % 10 in tenths]

    return Stock(share(PEOPLE.split()), share(THINGS.split()), share(range(100, 1000)), share(FRAMES))


TRAIN, DEVELOPMENT, HELD_OUT = _stock(range(7)), _stock(range(7, 8)), _stock(range(8, 10))


def pair(rng: random.Random, stock: Stock) -> dict[str, str]:
    """A sentence in the heavy style, and by the rules."""
    verb, preposition, number = (
        rng.choice(list(rule)) for rule in (PLAIN_BY_VERB, PLAIN_BY_PREPOSITION, FIGURE_BY_NUMBER)
    )
    kept = {
        "person": rng.choice(stock.people),
        "quality": rng.choice(QUALITIES.split()),
        "things": rng.choice(stock.things),
        "room": rng.choice(stock.rooms),
    }
    heavy = {"opening": rng.choice(OPENINGS), "weight": rng.choice(WEIGHTS), "verb": verb, "number": number}
    plain = {"opening": "", "weight": "", "verb": PLAIN_BY_VERB[verb], "number": FIGURE_BY_NUMBER[number]}
    frame = rng.choice(stock.frames)
    lean = frame.replace("in order to", "to")
    return {
        "prompt": _sentence(frame.format(**kept, **heavy, preposition=preposition)),
        "completion": _sentence(lean.format(**kept, **plain, preposition=PLAIN_BY_PREPOSITION[preposition])),
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def rows(seed: int = SEED, asked: Stock = HELD_OUT) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training pairs, and pairs that are only scored."""
    rng = random.Random(seed)
    train = [pair(rng, TRAIN) for _ in range(TRAIN_ROWS)]
    return train, [pair(rng, asked) for _ in range(HELD_OUT_ROWS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--development", type=Path, metavar="FILE", help="write these alone: they do not ship")
    file = parser.parse_args().development
    if file:
        sample_rows.write_to(file, rows(asked=DEVELOPMENT)[1])
    else:
        sample_rows.write("style", *rows())


if __name__ == "__main__":
    main()
