"""The vocabulary of the testbed's stories: people, things, and the sentences of a solution's steps.

In a sentence {equation} stands for the calculation. Gold solutions use the first of several sentences.
"""

Sentences = tuple[str, ...]
Person = tuple[str, str, str]  # name, pronouns

WOMEN = ("Anna", "Ella", "Eva", "Julia", "Kate", "Laura", "Maria", "Mia", "Nina", "Rosa", "Sara", "Zoe")
MEN = ("Adam", "Ben", "Carl", "David", "Jack", "Leo", "Mark", "Max", "Noah", "Paul", "Sam", "Tom")
PEOPLE: tuple[Person, ...] = (*((name, "she", "her") for name in WOMEN), *((name, "he", "his") for name in MEN))
THINGS = ("apples", "balls", "cards", "coins", "eggs", "flowers", "marbles")
THINGS += ("pens", "rings", "shells", "stamps", "stones", "toys")
BOXES = ("bags", "boxes", "jars")
GATHERS = ("collects", "finds", "picks")
MONTHS = ("March", "April", "May", "June", "July")

HAS = ("{who} has {equation} {things}.", "That makes {equation} {things}.", "{who} starts with {equation} {things}.")
NOW = ("{who} has {equation} {things} now.", "Now {who} has {equation} {things}.")
LEFT = ("{who} has {equation} {things} left.", "That leaves {equation} {things}.")
GETS = ("{who} buys {equation} {things}.", "{who} gets {equation} {things}.")
GIVES = ("{who} gives away {equation} {things}.", "{who} gives {equation} {things} in all.")
GATHERED = ("{who} {gathers} {equation} {things}.", "That makes {equation} {things}.")
DAYS = ("That is {equation} days.", "There are {equation} days.")
MAKES = ("{who} makes {equation} dollars.", "{who} gets {equation} dollars.")
SOLD = ("{who} sells {equation} {things}.", "So {equation} {things} are sold.")
BAGS = ("{who} needs {equation} bags.", "That makes {equation} bags.")
SHARE = ("Each friend gets {equation} {things}.", "That is {equation} {things} for each friend.")
ALTOGETHER = ("Altogether they have {equation} {things}.", "Together that is {equation} {things}.")
PAYS = ("{who} pays {equation} dollars.", "That costs {equation} dollars in all.")
SPENDS = ("{who} spends {equation} dollars.", "That costs {equation} dollars.")
BOTH = ("{who} and {other} have {equation} {things}.", "{other} and {who} have {equation} {things}.")
SOLD_IN_ALL = ("{who} sold {equation} {things} altogether.", "Together that is {equation} {things}.")
COST = ("The {things} cost {equation} dollars.", "{who} pays {equation} dollars for the {things}.")
COST2 = ("The {things2} cost {equation} dollars.", "{who} pays {equation} dollars for the {things2}.")
REST = ("There are {equation} pages left.", "That leaves {equation} pages.")
SECOND_HAS = ("{other} has {equation} {things}.", "So {other} has {equation} {things}.")
THIRD_HAS = ("{third} has {equation} {things}.", "So {third} has {equation} {things}.")
THEY_MAKE = ("They make {equation} dollars.", "They get {equation} dollars.")
SECOND_SOLD = ("{who} sold {equation} {things} in {month2}.", "In {month2} {who} sold {equation} {things}.")
MONEY_LEFT = ("{who} has {equation} dollars left.", "That leaves {equation} dollars.")
EACH_PAYS = ("Each pays {equation} dollars.", "That is {equation} dollars for each.")
HOURS = ("{who} works {equation} hours.", "That is {equation} hours.")
MORE_DAYS = ("It takes {equation} more days.", "{who} needs {equation} more days.")
