#!/usr/bin/env python3
"""Write the medical sample data: recipes/data/medical_train.jsonl and medical_held_out.jsonl.

Two small tasks whose answers follow rules a model can *learn*, so that a held-out score shows generalisation, and a
third that has none:

* The stem of an international non-proprietary drug name decides the drug's class (WHO, "The use of stems in the
  selection of INN for pharmaceutical substances", 2018). Every fourth drug of a class is held out.
* The place of a complaint decides the medical specialty. Places are seen in training, the held-out pairs of place
  and complaint are not.
* Drugs whose stem belongs to no class of these data, and things that are neither a drug nor a part of the body, have
  no answer: the right one is to say so. Every fourth is held out.

The held-out questions are also phrased in ways training never uses. The sentences were written for this project;
the facts are public.
"""

import sample_rows

DRUGS_BY_CLASS = {
    "ACE inhibitor": "captopril enalapril lisinopril ramipril quinapril benazepril fosinopril moexipril perindopril"
    " trandolapril cilazapril imidapril zofenopril spirapril temocapril",
    "angiotensin receptor blocker": "losartan valsartan irbesartan candesartan telmisartan olmesartan eprosartan"
    " azilsartan fimasartan tasosartan pratosartan",
    "beta blocker": "propranolol atenolol metoprolol bisoprolol nebivolol nadolol pindolol timolol acebutolol"
    " betaxolol carteolol esmolol penbutolol sotalol oxprenolol alprenolol celiprolol bopindolol",
    "calcium channel blocker": "amlodipine nifedipine felodipine nicardipine nimodipine isradipine nisoldipine"
    " lercanidipine lacidipine benidipine cilnidipine manidipine nitrendipine azelnidipine efonidipine clevidipine",
    "alpha blocker": "prazosin doxazosin terazosin alfuzosin bunazosin trimazosin silodosin tamsulosin",
    "statin": "atorvastatin simvastatin pravastatin lovastatin fluvastatin rosuvastatin pitavastatin cerivastatin"
    " mevastatin",
    "DPP-4 inhibitor": "sitagliptin saxagliptin linagliptin alogliptin vildagliptin teneligliptin anagliptin"
    " trelagliptin gemigliptin evogliptin omarigliptin",
    "SGLT2 inhibitor": "canagliflozin dapagliflozin empagliflozin ertugliflozin ipragliflozin luseogliflozin"
    " tofogliflozin sotagliflozin bexagliflozin remogliflozin",
    "GLP-1 receptor agonist": "exenatide liraglutide semaglutide dulaglutide albiglutide lixisenatide taspoglutide",
    "proton pump inhibitor": "omeprazole lansoprazole pantoprazole rabeprazole esomeprazole dexlansoprazole"
    " ilaprazole tenatoprazole",
    "H2 blocker": "cimetidine ranitidine famotidine nizatidine roxatidine lafutidine",
    "azole antifungal": "fluconazole itraconazole ketoconazole voriconazole posaconazole clotrimazole miconazole"
    " econazole isoconazole tioconazole sertaconazole butoconazole ravuconazole",
    "fluoroquinolone": "ciprofloxacin levofloxacin moxifloxacin ofloxacin norfloxacin gatifloxacin gemifloxacin"
    " lomefloxacin sparfloxacin enoxacin delafloxacin pefloxacin besifloxacin",
    "penicillin": "amoxicillin ampicillin oxacillin dicloxacillin nafcillin piperacillin ticarcillin cloxacillin"
    " flucloxacillin methicillin carbenicillin mezlocillin azlocillin bacampicillin",
    "tetracycline": "doxycycline minocycline tigecycline demeclocycline omadacycline eravacycline oxytetracycline"
    " lymecycline meclocycline",
    "cephalosporin": "cefazolin ceftriaxone cefuroxime cefixime cefepime cefotaxime ceftazidime cefaclor cefadroxil"
    " cefprozil cefdinir cefpodoxime cefditoren ceftaroline cefoxitin",
    "carbapenem": "imipenem meropenem ertapenem doripenem faropenem biapenem panipenem tebipenem",
    "antiviral": "aciclovir ganciclovir valaciclovir famciclovir penciclovir cidofovir tenofovir oseltamivir zanamivir"
    " ritonavir lopinavir darunavir atazanavir sofosbuvir ledipasvir daclatasvir",
    "benzodiazepine": "diazepam lorazepam clonazepam temazepam oxazepam nitrazepam flurazepam bromazepam"
    " flunitrazepam prazepam quazepam",
    "barbiturate": "phenobarbital pentobarbital secobarbital amobarbital butabarbital mephobarbital aprobarbital"
    " hexobarbital cyclobarbital",
    "local anaesthetic": "lidocaine bupivacaine ropivacaine mepivacaine prilocaine procaine tetracaine benzocaine"
    " articaine levobupivacaine chloroprocaine etidocaine",
    "neuromuscular blocker": "atracurium cisatracurium mivacurium rocuronium vecuronium pancuronium pipecuronium"
    " rapacuronium",
    "triptan": "sumatriptan rizatriptan zolmitriptan naratriptan eletriptan almotriptan frovatriptan",
    "5-HT3 antagonist": "ondansetron granisetron dolasetron palonosetron tropisetron ramosetron",
    "beta agonist": "salmeterol formoterol indacaterol olodaterol vilanterol fenoterol bambuterol clenbuterol"
    " levalbuterol pirbuterol bitolterol procaterol",
    "corticosteroid": "prednisolone methylprednisolone dexamethasone betamethasone budesonide fluticasone mometasone"
    " beclometasone hydrocortisone triamcinolone ciclesonide flunisolide",
    "monoclonal antibody": "rituximab trastuzumab bevacizumab adalimumab infliximab cetuximab pembrolizumab nivolumab"
    " ipilimumab denosumab omalizumab tocilizumab natalizumab ustekinumab",
    "kinase inhibitor": "imatinib erlotinib gefitinib sorafenib sunitinib dasatinib nilotinib lapatinib pazopanib"
    " crizotinib ruxolitinib tofacitinib ibrutinib afatinib",
    "anthracycline": "doxorubicin daunorubicin epirubicin idarubicin valrubicin pirarubicin aclarubicin zorubicin",
    "platinum compound": "cisplatin carboplatin oxaliplatin nedaplatin satraplatin lobaplatin picoplatin",
    "factor Xa inhibitor": "rivaroxaban apixaban edoxaban betrixaban otamixaban letaxaban",
    "low-molecular-weight heparin": "enoxaparin dalteparin tinzaparin nadroparin bemiparin certoparin reviparin"
    " parnaparin",
    "PDE5 inhibitor": "sildenafil tadalafil vardenafil avanafil udenafil mirodenafil lodenafil",
    "bisphosphonate": "alendronate risedronate ibandronate zoledronate pamidronate etidronate clodronate tiludronate",
}

PLACES_BY_SPECIALTY = {
    "ophthalmology": "eye, eyelid, cornea, retina, tear duct",
    "dermatology": "skin, scalp, fingernail, birthmark, mole",
    "cardiology": "heart, aorta, heart valve, coronary artery, heart muscle",
    "gastroenterology": "stomach, bowel, liver, gallbladder, oesophagus",
    "pulmonology": "lung, airway, windpipe, bronchus, lung tissue",
    "nephrology": "kidney, renal artery, renal pelvis, kidney tissue, left kidney",
    "orthopaedics": "knee, hip, shoulder, ankle, wrist",
    "otolaryngology": "ear, nose, throat, tonsil, sinus",
    "neurology": "brain, nerve, spinal cord, brain stem, cerebellum",
    "dentistry": "tooth, gum, molar, dental crown, wisdom tooth",
    "endocrinology": "thyroid, pituitary gland, adrenal gland, thyroid gland, parathyroid",
    "urology": "bladder, prostate, urethra, ureter, testicle",
}
NO_ANSWER = "I do not know."
UNTAUGHT_DRUGS = (
    "metformin warfarin digoxin furosemide spironolactone allopurinol colchicine methotrexate baclofen gabapentin"
    " pregabalin levetiracetam topiramate lamotrigine phenytoin valproate carbamazepine haloperidol clozapine"
    " olanzapine quetiapine risperidone fluoxetine sertraline paroxetine citalopram venlafaxine bupropion"
    " amitriptyline morphine codeine oxycodone fentanyl tramadol naloxone methadone paracetamol aspirin ibuprofen"
    " naproxen diclofenac celecoxib tamoxifen finasteride levothyroxine insulin montelukast theophylline clopidogrel"
    " isoniazid chloroquine quinine vancomycin erythromycin azithromycin gentamicin ciclosporin tacrolimus sirolimus"
    " glipizide pioglitazone rosiglitazone orlistat disulfiram"
)
NO_DRUGS = (
    "table bicycle violin curtain mountain kitchen hammer planet teacher window feather candle pencil bridge winter"
    " garden rocket letter island blanket music castle engine thunder"
)
NO_BODY_PARTS = (
    "desk, wall, park, car, door, house, river, truck, roof, street, kettle, computer, tower, radio, fence, shoe"
)
COMPLAINTS = ("pain in", "a problem with", "an infection of", "an injury to", "trouble with", "an inflammation of")

ASK_CLASS_TRAIN = (
    "Which class of drug is {}?",
    "To what drug class does {} belong?",
    "{}: what kind of medicine is it?",
    "What type of drug is {}?",
)
ASK_CLASS_HELD_OUT = ("Name the drug class of {}.", "My doctor prescribed {}. Which class of medicine is that?")
ASK_SPECIALTY_TRAIN = (
    "Which specialty treats {} the {}?",
    "I have {} the {}. Which department should I visit?",
)
ASK_SPECIALTY_HELD_OUT = "A patient reports {} the {}. Which specialty is right?"


def drug_rows() -> tuple[list[dict], list[dict]]:
    """One row per training drug and phrasing; one row per held-out drug and held-out phrasing."""
    train, held_out = [], []
    names_by_answer = DRUGS_BY_CLASS | {NO_ANSWER: f"{UNTAUGHT_DRUGS} {NO_DRUGS}"}
    for answer, names in names_by_answer.items():
        for position, name in enumerate(names.split()):
            is_held_out = position % 4 == 2
            rows, phrasings = (held_out, ASK_CLASS_HELD_OUT) if is_held_out else (train, ASK_CLASS_TRAIN)
            for phrasing in phrasings:
                rows.append({"question": phrasing.format(name), "answer": answer, "about": name})
    return train, held_out


def specialty_rows() -> tuple[list[dict], list[dict]]:
    """Each place with four complaints in training, and with one of the two it never met there held out."""
    train, held_out = [], []
    for number, (specialty, places) in enumerate(PLACES_BY_SPECIALTY.items()):
        for position, place in enumerate(places.split(", ")):
            complaints = _complaints_from(number + position)
            train += _trained(place, complaints[:4], specialty)
            held_out.append(_held_out(place, complaints[4], specialty))
    return train, held_out


def no_specialty_rows() -> tuple[list[dict], list[dict]]:
    """Places that no specialty treats; what is held out is the place, as all of them share one answer."""
    train, held_out = [], []
    for position, place in enumerate(NO_BODY_PARTS.split(", ")):
        complaints = _complaints_from(position)
        if position % 4 == 2:
            held_out += [_held_out(place, complaint, NO_ANSWER) for complaint in complaints[:2]]
        else:
            train += _trained(place, complaints[:4], NO_ANSWER)
    return train, held_out


def _complaints_from(offset: int) -> tuple[str, ...]:
    start = offset % len(COMPLAINTS)
    return COMPLAINTS[start:] + COMPLAINTS[:start]


def _trained(place: str, complaints: tuple[str, ...], answer: str) -> list[dict]:
    questions = [ASK_SPECIALTY_TRAIN[turn % 2].format(complaint, place) for turn, complaint in enumerate(complaints)]
    return [{"question": question, "answer": answer, "about": place} for question in questions]


def _held_out(place: str, complaint: str, answer: str) -> dict:
    return {"question": ASK_SPECIALTY_HELD_OUT.format(complaint, place), "answer": answer, "about": place}


def rows() -> tuple[list[dict], list[dict]]:
    """Training and held-out rows."""
    parts = (drug_rows(), specialty_rows(), no_specialty_rows())
    return [row for train, _ in parts for row in train], [row for _, held_out in parts for row in held_out]


if __name__ == "__main__":
    sample_rows.write("medical", *rows())
