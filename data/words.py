"""The words of the demo world: plain lists, so that the grammar in demo.py stays in sight."""

FEMALE = ("Ada Anna Clara Edith Greta Ida Julia Lena Maria Nora Rosa Vera").split()
MALE = ("Adam Boris Emil Felix Hugo Ivan Jonas Leo Max Oscar Paul Simon").split()
TOWNS = (
    "Alder Barrow Birchwood Brackley Camden Cliffside Dunmore Eastgate Elmhurst Fairview Fenwick Glenbrook Granby "
    "Harwick Hillford Ironbridge Kingsley Lakeside Langton Marbury Millbrook Newport Northam Oakdale Pinehill "
    "Quarry Redcliff Riverton Rockwell Sandport Silverton Southam Stonebridge Thornton Underhill Valley Westbury "
    "Willowby"
).split()
PLACES = (
    "airport attic bakery balcony bank barn beach bridge cabin castle cave cellar chapel church cinema clinic "
    "corner cottage courtyard dairy dock factory farm ferry field forest fountain garage garden gate greenhouse "
    "hall harbour hill hospital hotel island jetty kitchen laboratory lake library lighthouse market meadow mill "
    "monastery mountain museum office orchard palace park pavilion pier pond prison quay river school shed shop "
    "shore square stable stadium station street studio temple theatre tower tunnel village well windmill workshop "
    "yard zoo"
).split()
THINGS = (
    "anchor basket bell blanket bottle bucket candle carpet clock compass crown drum flute guitar hammer hat "
    "jewel key kite ladder lamp mirror necklace parcel piano puzzle ring saddle shovel sword telescope trumpet "
    "umbrella vase violin wheel"
).split()
COUNTED = (
    "acorns almonds apples beads berries biscuits books bottles boxes brooches buns cards carrots cherries "
    "chestnuts coins cookies crayons eggs feathers figs fish flowers grapes jars keys leaves lemons marbles "
    "matches melons mushrooms nuts olives onions oranges peaches pears pebbles pencils plums postcards potatoes "
    "radishes rings roses sacks seeds shells stamps sticks stones sweets tickets tomatoes toys tulips turnips "
    "walnuts"
).split()
HOLDERS = (
    "basin box bin cabinet case chest closet crate cupboard drawer hamper locker pouch safe tin trunk tub wagon"
).split()
COLOURS = (
    "amber beige black blue bronze brown copper crimson cream golden green grey indigo ivory orange pink purple "
    "red scarlet silver tan turquoise violet white yellow"
).split()
TRAITS = (
    "angry bold brave bright calm careful cheerful clever curious eager famous friendly gentle happy honest "
    "humble jolly kind lazy lonely lucky noisy old patient polite poor proud quick quiet rich serious shy silly "
    "sleepy stubborn tall tidy tired wise young"
).split()
LOOKS = (
    "ancient beautiful broken cheap clean dusty elegant fancy faded fine fragile heavy huge light little long "
    "lovely narrow new odd painted plain polished pretty round rusty shiny short simple small smooth soft solid "
    "square strange striped strong thick thin tiny useful wide wooden worn"
).split()
TIMES = ("afternoon autumn dawn evening holiday midnight monday morning night noon spring summer sunday winter").split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
# What is told in passing and never asked for.
FOODS = (
    "almonds apricots asparagus bacon bananas beans beef beetroot biryani bread broth butter cabbage cauliflower celery cheese chicken "
    "chocolate cider cocoa cream crumpets cucumber curry custard dates dumplings fudge garlic ginger gravy ham herring "
    "honeycomb jam jelly lamb lasagne leeks lentils lettuce liquorice lobster macaroni marmalade milkshake mustard "
    "mutton noodles nougat oatmeal omelettes pancakes parsley parsnips pasta pastries peas pepper pickles pies "
    "porridge pretzels pudding pumpkin rhubarb rice salad salmon sausages soup spinach stew strudel syrup tarts toast trout waffles"
).split()
ANIMALS = (
    "antelope badger bat bear beaver beetle blackbird bull butterfly calf camel canary cow cricket crow cuckoo deer donkey duck "
    "eagle eel elk falcon ferret finch fox frog gander gull hare hawk hedgehog hen heron hornet jackdaw kitten lark leopard lizard lynx "
    "magpie mole moth newt otter owl ox parrot peacock pelican pheasant pig pigeon pony puppy quail rabbit ram rat "
    "raven robin rook salamander seal sheep skunk snail sparrow spider squirrel starling stork swallow thrush tiger "
    "toad turkey turtle walrus wasp weasel wolf woodpecker wren"
).split()
# Weather that leaves the ground wet, and weather that does not.
WET = "damp foggy icy misty rainy snowy stormy wet".split()
DRY = "bright clear dry dusty hot mild sunny warm".split()
# What each trade works with.
_TRADES = (
    "baker:flour builder:bricks captain:map carpenter:nails dentist:drill doctor:thermometer farmer:plough fisher:net "
    "gardener:rake judge:gavel miner:torch nurse:bandage painter:brush soldier:shield tailor:needle writer:typewriter"
).split()
TOOLS = dict(pair.split(":") for pair in _TRADES)
# What happened, and what came of it.
CAUSES = [
    ("the rain did not stop", "the path was under water"),
    ("the bridge fell down", "nobody could cross the stream"),
    ("the oven was too hot", "the bread burned"),
    ("a storm broke the mast", "the ship came home late"),
    ("the baby cried all through it", "no one slept"),
    ("snow covered the road", "the bus did not come"),
    ("the dog barked at a stranger", "the thief ran away"),
    ("the milk turned sour", "the cat would not drink"),
    ("the lights went out", "they lit candles"),
    ("the wind blew the door open", "papers flew about the room"),
    ("a wheel came off", "the wagon stopped on the slope"),
    ("the alarm rang early", "everyone woke with a start"),
    ("the river froze", "children skated until supper"),
    ("the crops failed", "flour became dear"),
    ("the train left on time", "the slow travellers missed it"),
    ("a spark fell on the straw", "smoke rose above the roof"),
    ("the teacher fell ill", "lessons were cancelled"),
    ("the king visited", "music sounded from each window"),
    ("the pump cracked", "water dripped on the floor"),
    ("bees built a nest", "honey was plentiful"),
    ("the ice melted", "the swans returned"),
    ("the goat ate the list", "supper was a surprise"),
    ("thunder shook the house", "the horses bolted"),
    ("the sun came out", "the washing dried"),
    ("the paint was wet", "his sleeve got stained"),
    ("a glass slipped", "there were splinters on the mat"),
    ("the tide was high", "the boats could leave"),
    ("the mouse found cheese", "the trap stayed empty"),
    ("prices went up", "people bought less"),
    ("the choir practised hard", "the concert was a triumph"),
]
