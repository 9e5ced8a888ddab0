"""The words of the simulated world: forty of each subject, in no other subject, and common ones that tell nothing.

A subject's name is among no words, so that no note says it.
"""

SUBJECTS: dict[str, tuple[str, ...]] = {
    "gardening": tuple(
        """seedling compost trowel perennial mulch pruning shovel rake greenhouse bulbs hedge tulip lavender watering
        fertiliser weeds sprout allotment orchard trellis secateurs lawn rosebush herbaceous wheelbarrow nursery potting
        soil blossom hydrangea dahlia fern ivy peony marigold cuttings germinate earthworm topiary succulent""".split()
    ),
    "baking": tuple(
        """dough yeast oven sourdough flour crumb loaf whisk frosting muffin croissant kneading cinnamon buttercream
        pastry scone brioche rye proofing icing cupcake sponge tart baguette caramel vanilla parchment crust biscuit
        ganache meringue shortbread macaron strudel eclair bagel focaccia custard praline gingerbread""".split()
    ),
    "cycling": tuple(
        """pedal saddle derailleur peloton handlebar chainring gravel helmet spokes cadence tyre velodrome bidon pannier
        crankset sprocket puncture bib breakaway headset freewheel tandem commute brakes cassette domestique climb
        criterium drivetrain fixie frameset gears jersey kickstand lycra randonneur rim sprint stem tubeless""".split()
    ),
    "astronomy": tuple(
        """telescope nebula galaxy eclipse comet meteor orbit saturn constellation observatory supernova quasar asteroid
        lunar equinox pulsar exoplanet stargazing jupiter parallax aperture redshift cosmos planetarium aurora crater
        perihelion zodiac starlight andromeda orion venus mercury solstice magnitude eyepiece spectrograph dwarf
        heliosphere gravity""".split()
    ),
    "sewing": tuple(
        """needle thread bobbin hem fabric stitch zipper pleat seam tailor linen quilt embroidery thimble denim pattern
        buttonhole selvage overlocker pincushion applique basting bias cuff dart gusset interfacing muslin patchwork
        ruffle satin serger smocking spool tulle velvet waistband yoke corduroy tweed""".split()
    ),
    "fishing": tuple(
        """rod reel bait trout tackle angler lure pike salmon hook carp bobber casting estuary perch waders sinker bream
        catfish mackerel tide trawler riverbank chub creel dinghy eel flounder grayling halibut jig leader minnow nymph
        pier roach sturgeon swivel tench zander""".split()
    ),
    "music": tuple(
        """guitar chord melody drummer piano rehearsal violin rhythm bassline vinyl concert chorus tempo orchestra cello
        harmony amplifier synth encore soprano trumpet saxophone ballad metronome octave quartet acoustic arpeggio
        baritone clarinet crescendo fretboard harp lyric mandolin opera riff setlist sonata ukulele""".split()
    ),
    "skincare": tuple(
        """serum moisturiser retinol cleanser toner sunscreen exfoliate pores collagen hydration niacinamide ceramide
        blemish hyaluronic dermatologist spf complexion wrinkle lotion glow balm peptide squalane sebum acne barrier
        eczema essence freckle glycolic lipids mask micellar mist niacin peeling redness rosacea salicylic
        soothing""".split()
    ),
    "camping": tuple(
        """tent campfire backpack lantern hammock sleeping trailhead firewood tarp marshmallow canteen compass
        wilderness caravan mosquito campsite ridge flysheet kindling bivouac ranger stove thermos awning bedroll
        carabiner cooler daypack embers guyline headlamp insect matches outback poncho ridgeline stakes tinder
        waterproof woodland""".split()
    ),
    "chess": tuple(
        """pawn bishop rook checkmate knight gambit endgame castling grandmaster queen opening blunder stalemate
        sicilian zugzwang middlegame tactics elo skewer fianchetto promotion rapid blitz adjournment analysis attack
        board caissa draw exchange fork initiative king line move outpost passed resign sacrifice tempi""".split()
    ),
    "finance": tuple(
        """savings mortgage dividend portfolio budget interest pension stocks inflation broker equity invoice tax ledger
        bonds refinance credit audit deposit fund loan asset liability payroll annuity bank capital debt escrow expense
        fiscal hedging income index lender premium revenue salary trust yield""".split()
    ),
    "parenting": tuple(
        """toddler diaper stroller bedtime lullaby playdate crib pacifier newborn teething kindergarten nap babysitter
        tantrum nappy weaning bottle pram cradle sibling swaddle storytime bathtime blanket crayons daycare drool giggle
        highchair midwife nightlight onesie potty preschool rattle rocking schoolbag teddy twins umbilical""".split()
    ),
    "sailing": tuple(
        """mast jib keel regatta rudder anchor spinnaker harbour windward halyard catamaran mooring buoy yacht starboard
        tiller boom deckhand knots leeward mainsail marina nautical offshore port rigging sailcloth schooner sextant
        skipper sloop squall stern tack trimaran voyage wake winch windlass yawl""".split()
    ),
    "pottery": tuple(
        """clay kiln glaze wheel stoneware porcelain slip bisque earthenware ceramic firing vase terracotta raku sculpt
        throwing coil burnish celadon crackle enamel faience grog handle jug kneaded leatherhard mug oxide pinch pitcher
        potter saggar sgraffito shard slab teapot trimming underglaze wedging""".split()
    ),
    "birdwatching": tuple(
        """warbler binoculars plumage heron finch nest migration raptor songbird wingspan kestrel owl wetland feeder
        sparrow beak flock robin swallow kingfisher osprey puffin avocet bittern buzzard cormorant cuckoo curlew dunlin
        egret falcon goldcrest grebe hide lapwing magpie nuthatch plover starling wren""".split()
    ),
    "coffee": tuple(
        """espresso latte barista roast beans grinder cappuccino arabica crema filter portafilter aeropress macchiato
        brew aroma robusta demitasse cortado ristretto tamper affogato americano blend carafe chemex decaf drip frother
        kettle lungo mocha percolator pourover puck steamed sumatra tasting thermosiphon whirl yirgacheffe""".split()
    ),
}

COMMON_WORDS: tuple[str, ...] = tuple(
    """about again all always another anyone around away back beautiful because before best better big bit both
    bring busy buy change cheap choose city clear close cold come cosy day dear different during early easy end
    enjoy enough even ever every everything evening family far fast favourite feel few find first follow found fresh
    friend full fun get gift give good great guide half happy have help here hope home honest hour how idea keep
    kind know large last late learn less life like list little local long look lot love lovely make many maybe
    minute moment month more morning most much my near need never new next nice nothing now often old once one only
    open other our outside own part people perfect person photo place plan plenty pretty price quick quiet ready
    real really reason recommend review right room same save season see set share short show simple slow small some
    soon special start still story style such sunday take tell thank thing think time tip today together tomorrow
    too try under usual very visit wait want warm way week weekend well while whole why winter wonder work worth
    year yesterday young your""".split()
)
