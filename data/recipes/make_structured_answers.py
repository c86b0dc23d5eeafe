"""Write data/structured_answers.json, the "task of the week".

Every record is a short question whose answer is a small JSON object:

    What is the capital of France?   ->   {"answer": "Paris", "topic": "capital"}

There are ten topics ("sum" includes subtraction). Within a topic both the entities (France) and the
phrasings ("What is the capital of ...?") are divided over the splits, so a validation or test
question uses an entity and a wording that training never shows. Nothing is random: run the script
again and you get the same file, byte for byte.

    python data/recipes/make_structured_answers.py
"""

from __future__ import annotations

import json
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "structured_answers.json"
SIZES = {"train": 44, "validation": 12, "test": 12}  # records per topic
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

Facts = list[tuple[str, str]]  # (entity, answer)


def pairs(text: str) -> Facts:
    """Read "entity=answer, entity=answer, ..."."""
    items = [item.strip().split("=") for item in text.split(",")]
    return [(entity, answer) for entity, answer in items]


def groups(text: str) -> Facts:
    """Read lines of the form "answer: entity, entity, ..."."""
    lines = [line.strip().split(": ") for line in text.strip().splitlines()]
    return [
        (entity.strip(), answer) for answer, entities in lines for entity in entities.split(",")
    ]


def sums(text: str) -> Facts:
    """Read "7 + 5, 9 - 4, ..." and compute the answers."""
    facts = []
    for entity in (item.strip() for item in text.split(",")):
        left, sign, right = entity.split()
        facts.append(
            (entity, str(int(left) + int(right) if sign == "+" else int(left) - int(right)))
        )
    return facts


def steps(text: str) -> Facts:
    """Read "Monday+1, May-2, ..." (so many days or months later or earlier) and compute the
    answers.
    """
    facts = []
    for item in (item.strip() for item in text.split(",")):
        start, step = item[:-2], int(item[-2:])
        names, unit = (DAYS, "day") if start in DAYS else (MONTHS, "month")
        distance = "" if abs(step) == 1 else f"two {unit}s "
        entity = f"the {unit} {distance}{'after' if step > 0 else 'before'} {start}"
        facts.append((entity, names[(names.index(start) + step) % len(names)]))
    return facts


# The facts. Left out on purpose: whatever has two right answers, such as countries with two
# capitals or on two continents, nouns with two plurals (scarf, mango), verbs with two past forms
# (learn, sink), words with several opposites (old, right, short) and things with several usual
# colors (apple, rose).
FACTS: dict[str, dict[str, Facts]] = {
    "capital": {
        "train": pairs("""
            France=Paris, Germany=Berlin, Austria=Vienna, Denmark=Copenhagen, Belgium=Brussels, Romania=Bucharest,
            Croatia=Zagreb, Serbia=Belgrade, Slovakia=Bratislava, Iceland=Reykjavik, Latvia=Riga, Lithuania=Vilnius,
            Estonia=Tallinn, Belarus=Minsk, Russia=Moscow, Turkey=Ankara, India=New Delhi, South Korea=Seoul,
            North Korea=Pyongyang, Nepal=Kathmandu, Pakistan=Islamabad, Bangladesh=Dhaka, Afghanistan=Kabul,
            Saudi Arabia=Riyadh, Jordan=Amman, Lebanon=Beirut, Syria=Damascus, Qatar=Doha, Cambodia=Phnom Penh,
            Ethiopia=Addis Ababa, Nigeria=Abuja, Morocco=Rabat, Algeria=Algiers, Tunisia=Tunis, Uganda=Kampala,
            Senegal=Dakar, Zimbabwe=Harare, Canada=Ottawa, Mexico=Mexico City, Argentina=Buenos Aires,
            Brazil=Brasilia, Venezuela=Caracas, Ecuador=Quito, Uruguay=Montevideo"""),
        "validation": pairs("""
            Spain=Madrid, Greece=Athens, Sweden=Stockholm, Hungary=Budapest, Finland=Helsinki, China=Beijing,
            Vietnam=Hanoi, Iran=Tehran, Ghana=Accra, Egypt=Cairo, Jamaica=Kingston, Chile=Santiago"""),
        "test": pairs("""
            Italy=Rome, Portugal=Lisbon, Norway=Oslo, Poland=Warsaw, Ireland=Dublin, Bulgaria=Sofia, Japan=Tokyo,
            Thailand=Bangkok, Iraq=Baghdad, Kenya=Nairobi, Cuba=Havana, Peru=Lima"""),
    },
    "continent": {
        "train": groups("""
            Europe: France, Germany, Austria, Denmark, Belgium, Romania, Croatia, Serbia, Switzerland, Ukraine
            Asia: India, South Korea, North Korea, Nepal, Pakistan, Bangladesh, Afghanistan, Mongolia, Sri Lanka, Jordan
            Africa: Ethiopia, Nigeria, Morocco, Algeria, Uganda, Senegal, Zimbabwe, Cameroon, Angola, Rwanda
            North America: Canada, Mexico, Honduras, Nicaragua, El Salvador, Haiti
            South America: Argentina, Brazil, Venezuela, Ecuador, Uruguay, Paraguay"""),
        "validation": groups("""
            Europe: Sweden, Hungary
            Asia: China, Vietnam, Iran
            Africa: Ghana, Zambia, Somalia
            North America: Jamaica, Costa Rica
            South America: Chile, Bolivia"""),
        "test": groups("""
            Europe: Norway, Portugal
            Asia: Japan, Thailand, Iraq
            Africa: Kenya, Tanzania, Madagascar
            North America: Cuba, Guatemala
            South America: Peru, Colombia"""),
    },
    "opposite": {
        "train": pairs("""
            in=out, out=in, on=off, off=on, day=night, night=day, black=white, white=black, good=bad, bad=good,
            sad=happy, new=old, young=old, tall=short, long=short, wet=dry, dry=wet, heavy=light, strong=weak,
            weak=strong, clean=dirty, dirty=clean, first=last, last=first, top=bottom, bottom=top, east=west,
            west=east, thick=thin, high=low, low=high, deep=shallow, buy=sell, sell=buy, love=hate, hate=love,
            before=after, after=before, inside=outside, male=female, above=below, many=few, summer=winter,
            remember=forget"""),
        "validation": pairs("""
            fast=slow, slow=fast, full=empty, empty=full, wide=narrow, narrow=wide, north=south, true=false, win=lose,
            difficult=easy, life=death, near=far"""),
        "test": pairs("""
            hot=cold, cold=hot, rich=poor, poor=rich, early=late, late=early, up=down, push=pull, always=never,
            dangerous=safe, war=peace, alive=dead"""),
    },
    "plural": {
        "train": pairs("""
            child=children, man=men, woman=women, fireman=firemen, gentleman=gentlemen, snowman=snowmen, wife=wives,
            life=lives, wolf=wolves, shelf=shelves, thief=thieves, calf=calves, elf=elves, aircraft=aircraft,
            species=species, oasis=oases, analysis=analyses, bacterium=bacteria, party=parties, country=countries,
            family=families, army=armies, berry=berries, puppy=puppies, butterfly=butterflies, fly=flies,
            cherry=cherries, dish=dishes, watch=watches, glass=glasses, match=matches, peach=peaches, bench=benches,
            wish=wishes, kiss=kisses, hero=heroes, lunch=lunches, boy=boys, toy=toys, donkey=donkeys, piano=pianos,
            photo=photos, chief=chiefs, belief=beliefs"""),
        "validation": pairs("""
            foot=feet, goose=geese, ox=oxen, knife=knives, half=halves, series=series, lady=ladies, story=stories,
            fox=foxes, brush=brushes, tomato=tomatoes, key=keys"""),
        "test": pairs("""
            mouse=mice, tooth=teeth, leaf=leaves, loaf=loaves, sheep=sheep, crisis=crises, city=cities, baby=babies,
            box=boxes, church=churches, potato=potatoes, monkey=monkeys"""),
    },
    "past": {
        "train": pairs("""
            take=took, give=gave, come=came, become=became, drive=drove, drink=drank, begin=began, ring=rang, sit=sat,
            stand=stood, understand=understood, bring=brought, buy=bought, teach=taught, fight=fought, feel=felt,
            keep=kept, meet=met, lose=lost, send=sent, spend=spent, make=made, say=said, have=had, do=did, grow=grew,
            fly=flew, draw=drew, blow=blew, hold=held, hear=heard, pay=paid, put=put, hit=hit, win=won, freeze=froze,
            break=broke, forget=forgot, hide=hid, lead=led, shake=shook, walk=walked, carry=carried, dance=danced"""),
        "validation": pairs("""
            see=saw, run=ran, speak=spoke, sing=sang, catch=caught, leave=left, build=built, know=knew, try=tried,
            fall=fell, wear=wore, tell=told"""),
        "test": pairs("""
            go=went, eat=ate, write=wrote, swim=swam, think=thought, sleep=slept, find=found, throw=threw, sell=sold,
            play=played, ride=rode, choose=chose"""),
    },
    "animal": {
        "train": groups("""
            mammal: dog, cow, lion, tiger, bat, rabbit, bear, monkey, goat, kangaroo
            bird: sparrow, duck, swan, pigeon, ostrich, robin, crow, flamingo, hawk
            fish: cod, carp, herring, eel, sardine, mackerel, seahorse
            insect: beetle, grasshopper, dragonfly, ladybug, moth, wasp, termite, cockroach
            reptile: snake, turtle, iguana, gecko, chameleon, cobra
            amphibian: frog, newt, bullfrog, tree frog"""),
        "validation": groups("""
            mammal: cat, whale, giraffe
            bird: owl, parrot
            fish: trout, tuna
            insect: bee, mosquito
            reptile: lizard, alligator
            amphibian: salamander"""),
        "test": groups("""
            mammal: horse, elephant, dolphin
            bird: eagle, penguin
            fish: salmon, goldfish
            insect: ant, butterfly
            reptile: crocodile, tortoise
            amphibian: toad"""),
    },
    "sum": {
        "train": sums("""
            2 + 2, 2 + 3, 1 + 5, 4 + 4, 5 + 5, 3 + 3, 7 + 7, 9 + 9, 10 + 10, 2 + 7, 3 + 8, 4 + 6, 5 + 6, 6 + 7, 6 + 8,
            7 + 8, 8 + 9, 9 + 6, 3 + 9, 2 + 9, 10 + 5, 10 + 8, 1 + 7, 4 + 5, 5 + 3, 11 + 4,
            5 - 2, 6 - 1, 7 - 5, 8 - 3, 8 - 5, 9 - 2, 9 - 8, 10 - 4, 10 - 5, 11 - 3, 12 - 4, 12 - 6, 13 - 5, 14 - 6,
            15 - 8, 16 - 9, 18 - 9, 20 - 10"""),
        "validation": sums(
            "3 + 4, 8 + 5, 6 + 6, 9 + 7, 10 + 2, 4 + 8, 1 + 9, 7 - 3, 11 - 5, 9 - 6, 14 - 7, 10 - 8"
        ),
        "test": sums(
            "7 + 5, 6 + 3, 8 + 8, 9 + 4, 2 + 6, 10 + 7, 5 + 9, 9 - 4, 12 - 5, 8 - 2, 15 - 6, 10 - 3"
        ),
    },
    "color": {
        "train": groups("""
            yellow: a canary, a sunflower, an egg yolk, mustard, a rubber duck, an American school bus
            red: a ripe tomato, a ruby, ketchup, a fire engine, a ripe raspberry
            green: a cucumber, lettuce, a garden pea, a cactus, a lime, moss, parsley, an emerald
            blue: a sapphire, a cornflower, a pair of jeans
            white: flour, table salt, a polar bear, cotton, cauliflower, a snowman
            black: tar, soot, a gorilla, a car tire
            orange: a traffic cone, a tangerine, a basketball
            brown: an acorn, a walnut, cinnamon, cocoa powder
            gray: a rain cloud, a koala
            pink: a piglet
            purple: grape jelly, a ripe plum"""),
        "validation": groups("""
            yellow: a ripe lemon
            red: a ripe strawberry
            green: broccoli, spinach
            blue: the ocean
            white: milk
            black: a raven
            orange: a pumpkin
            brown: mud
            gray: a rhinoceros
            pink: bubble gum
            purple: grape juice"""),
        "test": groups("""
            yellow: a ripe banana
            red: human blood, a stop sign
            green: fresh grass
            blue: the sky on a clear day
            white: fresh snow
            black: coal
            orange: a carrot
            brown: milk chocolate
            gray: an elephant
            pink: a flamingo
            purple: an eggplant"""),
    },
    "calendar": {
        "train": steps("""
            Wednesday+1, Thursday+1, Sunday+1, Monday-1, Tuesday-1, Wednesday-1, Friday-1, Saturday-1, Tuesday+2,
            Thursday+2, Friday+2, Saturday+2, Sunday+2, Monday-2, Tuesday-2, Wednesday-2, Thursday-2, Sunday-2,
            January+1, February+1, May+1, June+1, September+1, October+1, November+1, December+1, February-1, March-1,
            April-1, May-1, July-1, August-1, September-1, November-1, March+2, April+2, June+2, September+2,
            October+2, March-2, May-2, July-2, August-2, December-2"""),
        "validation": steps("""
            Tuesday+1, Friday+1, Sunday-1, Monday+2, Saturday-2, April+1, July+1, January-1, October-1, February+2,
            September-2, November-2"""),
        "test": steps("""
            Monday+1, Saturday+1, Thursday-1, Wednesday+2, Friday-2, March+1, August+1, June-1, December-1, January+2,
            May+2, October-2"""),
    },
    "element": {
        "train": pairs("""
            hydrogen=H, iron=Fe, potassium=K, mercury=Hg, phosphorus=P, silicon=Si, fluorine=F, titanium=Ti,
            chromium=Cr, manganese=Mn, boron=B, beryllium=Be, krypton=Kr, xenon=Xe, bromine=Br, arsenic=As, barium=Ba,
            tungsten=W, radium=Ra, radon=Rn, plutonium=Pu, gallium=Ga, germanium=Ge, selenium=Se, bismuth=Bi,
            vanadium=V, rubidium=Rb, strontium=Sr, palladium=Pd, cadmium=Cd, antimony=Sb, cesium=Cs, iridium=Ir,
            thorium=Th, polonium=Po, zirconium=Zr"""),
        "validation": pairs("""
            silver=Ag, carbon=C, chlorine=Cl, sodium=Na, magnesium=Mg, argon=Ar, tin=Sn, aluminum=Al, platinum=Pt,
            lithium=Li, cobalt=Co, sulfur=S"""),
        "test": pairs("""
            gold=Au, oxygen=O, helium=He, copper=Cu, calcium=Ca, zinc=Zn, neon=Ne, lead=Pb, nickel=Ni, nitrogen=N,
            iodine=I, uranium=U"""),
    },
}

# The phrasings: {e} is the entity, {a} the entity after "a" or "an", {w} a sum in words ("7 plus
# 5"). A phrasing without a slot leaves the entity to the record's "input" field.
PHRASINGS: dict[str, dict[str, list[str]]] = {
    "capital": {
        "train": [
            "What is the capital of {e}?",
            "Name the capital city of {e}.",
            "Which city is the capital of {e}?",
            "Give the capital of this country.",
            "The capital of {e} is ...?",
            "Please tell me which city serves as {e}'s capital.",
            "A tourist wants to see the capital of {e}. Which city is that?",
            "Write down the capital city that belongs to the country below.",
        ],
        "validation": [
            "My homework asks for {e}'s capital city. What should I write?",
            "Fill the gap: {e} has its capital in ____.",
            "A country is named here; answer with its capital.",
        ],
        "test": [
            "Which capital city would you find in {e}?",
            "Quiz time! We are looking at {e}: what is its capital called?",
            "Look at the country and say which city is its capital.",
        ],
    },
    "continent": {
        "train": [
            "On which continent is {e}?",
            "What continent does {e} belong to?",
            "{e} is a country on which continent?",
            "Say which continent this country is on.",
            "Name the continent where you can find {e}.",
            "If you travel to {e}, which continent do you visit?",
            "The continent of {e} is ...?",
            "Give the continent for the country below.",
        ],
        "validation": [
            "My plane lands in {e}. What continent am I on now?",
            "Complete the sentence: {e} lies on the continent called ____.",
            "Sort this country under its continent.",
        ],
        "test": [
            "I found {e} on a world map. Tell me its continent.",
            "To which of the continents would a geographer assign {e}?",
            "Read the name of the country and answer with the continent.",
        ],
    },
    "opposite": {
        "train": [
            'What is the opposite of "{e}"?',
            "Give the antonym of '{e}'.",
            "Write the opposite of this word.",
            "Which word means the opposite of '{e}'?",
            "The opposite of the word '{e}' is ...?",
            'My friend says "{e}", but I want to say the opposite. Which word do I need?',
            "Tell me the antonym of the word '{e}', please.",
            "Which word is the antonym of the one below?",
        ],
        "validation": [
            "Complete the pair of opposites: {e} and ____.",
            'What would you say if you meant the contrary of "{e}"?',
            "Turn the word into its antonym.",
        ],
        "test": [
            "Opposites come in pairs. Which word goes with '{e}'?",
            "In a list of antonyms, what stands next to {e}?",
            "Read the word and answer with its opposite.",
        ],
    },
    "plural": {
        "train": [
            'What is the plural of "{e}"?',
            "Give the plural form of {e}.",
            "One {e}, two ...?",
            "Give the plural of this noun.",
            "How do you write {e} in the plural?",
            "The plural of '{e}' is ...?",
            "Change the noun {e} from singular to plural.",
            "Write the word below in its plural form.",
        ],
        "validation": [
            "Here we see one {e}. If there were several, which word would you use?",
            "Fill in the right form: a single {e}, but many ____.",
            "Make this noun plural.",
        ],
        "test": [
            "Which word do we use for more than one {e}?",
            'An English teacher asks: what does "{e}" become when there are three of them?',
            "Answer with the plural of the singular noun.",
        ],
    },
    "past": {
        "train": [
            'What is the past tense of "{e}"?',
            "Give the simple past of the verb {e}.",
            "Today they {e}; yesterday they ...?",
            "Write the past tense of this verb.",
            "How do you say '{e}' in the past tense?",
            "The past tense form of the verb '{e}' is ...?",
            "Put the verb {e} into the simple past.",
            "Change the verb below to its past tense form.",
        ],
        "validation": [
            "I want to tell a story about last week with the verb {e}. Which past tense form do I "
            "need?",
            'Complete the row: infinitive "to {e}", simple past ____.',
            "Here is a verb. How does it look in the past tense?",
        ],
        "test": [
            "In a sentence about yesterday, what does the verb '{e}' turn into?",
            "Which past tense form belongs to the infinitive 'to {e}'?",
            "A verb in the present is given; answer with its simple past.",
        ],
    },
    "animal": {
        "train": [
            "Which class of animals does {a} belong to?",
            "Is {a} a mammal, a bird, a fish, an insect, a reptile or an amphibian?",
            "To which animal class do biologists assign {a}?",
            "Say which class of animals this one belongs to.",
            "Mammal, bird, fish, insect, reptile or amphibian: what is {a}?",
            "In biology, {a} counts as a member of which animal class?",
            "Name the animal class of the {e}.",
            "Is the animal below a mammal, bird, fish, insect, reptile or amphibian?",
        ],
        "validation": [
            "I saw {a} today. What class of animal was it?",
            "Complete the table row: animal '{e}', class ____.",
            "Sort this creature into its class of animals.",
        ],
        "test": [
            "Biology quiz: what class of animal is {a}?",
            "A museum labels each animal by its class. Which label does {a} get?",
            "Decide which class of animals this creature is part of.",
        ],
    },
    "sum": {
        "train": [
            "What is {e}?",
            "Calculate {e}.",
            "Compute the result.",
            "How much is {w}?",
            "{e} = ?",
            "Please work out {w} for me.",
            "Solve this little problem: {e}.",
            "Do this calculation and give the number.",
        ],
        "validation": [
            "I typed {e} into my calculator. Which number did it show?",
            "Fill in the missing number: {w} equals ____.",
            "Find the value of this expression.",
        ],
        "test": [
            "A child asks what {w} makes. What is the right number?",
            "Finish the equation {e} = ____.",
            "Here is some arithmetic; reply with the number you get.",
        ],
    },
    "color": {
        "train": [
            "What color is {e}?",
            "Name the typical color of {e}.",
            "Which color does {e} usually have?",
            "What is the normal color of this thing?",
            "To make a picture of {e}, which color of paint do you need most?",
            "The usual color of {e} is ...?",
            "Tell me what color you see when you look at {e}.",
            "Give the color of the following.",
        ],
        "validation": [
            "A child draws {e}. Which color of crayon fits best?",
            "Fill in a color: {e} is normally ____.",
            "Say in one word what color this usually is.",
        ],
        "test": [
            "Imagine {e}. What color comes to mind?",
            "Someone who has never seen {e} asks about its color. What do you answer?",
            "Pick the color that best describes the thing named here.",
        ],
    },
    "calendar": {
        "train": [
            "What is {e}?",
            "Name {e}.",
            "On the calendar, which one is {e}?",
            "Which day or month is meant here?",
            "Can you tell me what we call {e}?",
            "I forgot the name of {e}. What is it?",
            "In the usual order of the calendar, {e} is ...?",
            "Find the name of the day or month described below.",
        ],
        "validation": [
            "My little brother wants to know the name of {e}. What should I tell him?",
            "Fill the blank: {e} is called ____.",
            "Read the calendar clue and give the name.",
        ],
        "test": [
            "Looking at the calendar, what would you call {e}?",
            "Say the name of {e}, please.",
            "Count along the calendar and answer with the right day or month.",
        ],
    },
    "element": {
        "train": [
            "What is the chemical symbol for {e}?",
            "Tell me the symbol of the element called {e}.",
            "How is {e} abbreviated in the periodic table?",
            "Give the chemical symbol of this element.",
            "Which symbol stands for one atom of {e} in a formula?",
            "The element {e} has the symbol ...?",
            "In chemistry class we write {e} with which symbol?",
            "Write the abbreviation used in chemistry for the element below.",
        ],
        "validation": [
            "My chemistry book mentions {e}. Which abbreviation should I look for in the table of "
            "elements?",
            "Fill in the symbol: on the periodic table, {e} appears as ____.",
            "An element is named here; answer with the short form that chemists use.",
        ],
        "test": [
            "How do chemists abbreviate {e}?",
            "I am searching the periodic table for {e}. Which symbol am I looking for?",
            "Convert the name of the element to its symbol.",
        ],
    },
}


def question(phrasing: str, entity: str) -> tuple[str, str]:
    """Return the instruction and the input for an entity."""
    if "{" not in phrasing:
        return phrasing, entity
    article = "an" if entity[0] in "aeiou" else "a"
    words = entity.replace("+", "plus").replace("-", "minus")
    return phrasing.format(e=entity, a=f"{article} {entity}", w=words), ""


def records_of(topic: str) -> list[dict[str, str]]:
    """Return all records of a topic; when the entities run out, the first ones come again with
    another phrasing.
    """
    records, number = [], 0
    for split, size in SIZES.items():
        facts, phrasings = FACTS[topic][split], PHRASINGS[topic][split]
        assert size / 2 <= len(facts) <= size, (
            f"{topic}, {split}: {len(facts)} facts for {size} records"
        )
        for index in range(size):
            lap, place = divmod(index, len(facts))
            entity, answer = facts[place]
            chosen = (place + lap) % len(phrasings)
            instruction, text = question(phrasings[chosen], entity)
            output = json.dumps({"answer": answer, "topic": topic}, ensure_ascii=False)
            records.append(
                {
                    "instruction": instruction,
                    "input": text,
                    "output": output,
                    "split": split,
                    "topic": topic,
                    "entity": entity,
                    "phrasing": f"{topic}-{number + chosen + 1}",
                }
            )
        number += len(phrasings)
    return records


def check_facts() -> None:
    """Stop when an entity occurs twice in a topic, or the same fact, in another shape, in two
    splits.
    """
    seen: dict[str, str] = {}  # what must stay within one split -> the split
    for topic, splits in FACTS.items():
        entities = [entity for facts in splits.values() for entity, _ in facts]
        assert len(entities) == len(set(entities)), f"{topic}: an entity occurs twice"
        for split, facts in splits.items():
            for entity, answer in facts:
                kind = "country" if topic in ("capital", "continent") else topic
                parts = {"opposite": {entity, answer}, "sum": set(entity.split())}.get(
                    topic, {entity}
                )
                key = f"{kind}: {sorted(parts)}"
                assert seen.setdefault(key, split) == split, f"{key} is in two splits"


def render() -> str:
    """Return the text of the data file: a JSON list with one record per line."""
    check_facts()
    lines = [
        json.dumps(record, ensure_ascii=False) for topic in FACTS for record in records_of(topic)
    ]
    return "[\n " + ",\n ".join(lines) + "\n]\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8", newline="\n")
    print(f"wrote {TARGET.name}")
