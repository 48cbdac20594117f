"""The words of the demo world: plain lists, so that the grammar in demo.py stays in sight."""

FEMALE = (
    "Ada Alma Anna Aria Bella Carla Clara Dana Della Edith Elsa Emma Erin Fiona Flora Gina Greta Hanna Hazel "
    "Helga Ida Ines Iris Isla Jana Joan Julia June Karin Kate Lara Laura Lena Lily Linda Lucy Mara Maria Maud "
    "Mina Molly Nadia Nelly Nina Nora Olga Olive Paula Petra Polly Rita Rosa Ruth Sara Selma Sonia Stella Tessa "
    "Vera Wanda"
).split()
MALE = (
    "Adam Albert Alex Arno Barry Ben Boris Bruno Carl Cedric Colin Conrad Dan David Derek Dirk Edgar Emil Eric "
    "Felix Frank Fred Gavin George Gus Hans Harry Henry Hugo Ivan Jack Jacob James Jonas Karl Kevin Kurt Lars Leo "
    "Louis Luke Marco Mark Max Milo Nick Noah Oscar Otto Paul Peter Ralf Robin Rudi Sam Simon Theo Tom Victor "
    "Walter"
).split()
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
    "anchor apron arrow axe backpack badge bag ball banner basket bell belt bicycle blanket book boot bottle bowl "
    "bracelet brick broom brush bucket button cage cake camera candle cap carpet cart chain chair chart clock "
    "coat coin comb compass crown cup curtain cushion dagger diary doll drum envelope fan feather flag flask "
    "flute fork frame globe glove goblet guitar hammer harp hat helmet hook horn jacket jar jewel key kettle kite "
    "knife ladder lamp lantern lens letter lock magnet map mask medal mirror mop mug nail napkin necklace needle "
    "net notebook oar paddle pan parcel pen pencil pendant phone photograph piano picture pillow pipe plate "
    "poster pot puppet purse puzzle quilt racket radio rake ribbon ring robe rope ruler saddle sail saw scarf "
    "scissors screw shawl shield shovel sketch sledge soap spade spear spoon stamp statue stool suitcase sword "
    "tablet telescope tent thimble ticket torch towel toy trophy trumpet umbrella vase violin wallet wand watch "
    "wheel whistle wig wrench yarn"
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
# Weather that leaves the ground wet, and weather that does not.
WET = "damp drizzly foggy frosty icy misty muddy rainy showery slushy snowy soggy stormy wet".split()
DRY = "bright clear cloudless dry dusty fair fine hot mild parched sunny sweltering warm windless".split()
# What each trade works with.
_TRADES = (
    "baker:flour barber:comb builder:bricks butcher:cleaver captain:compass carpenter:hammer clerk:pen cook:pan "
    "dancer:shoes dentist:drill doctor:thermometer driver:wheel farmer:plough fisher:net florist:vase "
    "gardener:rake glazier:glass grocer:scales guard:whistle guide:map hunter:bow inventor:gears jeweller:lens "
    "judge:gavel lawyer:papers librarian:catalogue locksmith:key mason:trowel mayor:seal miller:grain miner:lamp "
    "musician:violin nurse:bandage painter:brush pilot:radio plumber:pipe poet:pencil porter:trolley potter:clay "
    "printer:ink ranger:telescope sailor:rope sculptor:chisel shepherd:staff singer:microphone smith:anvil "
    "soldier:shield student:book surgeon:scalpel tailor:needle teacher:chalk trader:ledger waiter:tray "
    "watchmaker:clock weaver:loom writer:typewriter"
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
